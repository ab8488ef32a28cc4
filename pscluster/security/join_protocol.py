"""What the join endpoint and its clients send each other: one JSON line each way over TLS, then the end.

{"ask": "authority"} -> {"authority_pem"}
{"ask": "join", "secret", "name", "csr_pem", "protocol"} -> {"certificate_pem", "authority_pem"} or {"error"}"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from pscluster import errors
from pscluster.errors import AuthError, CallerError, PsError

DEADLINE_S = 10.0  # for one line and its answer
MAX_LINE_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """Asks for a certificate. `secret`: of a join token. `protocol`: the caller's rpc.PROTOCOL."""

    secret: str = field(repr=False)
    name: str
    csr_pem: str
    protocol: int


@dataclass(frozen=True, kw_only=True)
class JoinAnswer:
    """`certificate_pem`: empty where only the authority was asked for."""

    authority_pem: str
    certificate_pem: str = ""


def pack_request(request: JoinRequest | None) -> bytes:
    """The line of a request; None: for the authority alone."""
    return _line({"ask": "authority"} if request is None else {"ask": "join", **asdict(request)})


def unpack_request(line: bytes) -> JoinRequest | None:
    """The inverse of `pack_request`. Raises CallerError for anything else."""
    try:
        found = json.loads(line)
        if found["ask"] == "authority":
            return None
        if found["ask"] != "join":
            raise ValueError("nothing else can be asked")
        texts = {name: _text(found[name]) for name in ("secret", "name", "csr_pem")}
        if type(found["protocol"]) is not int:
            raise TypeError("it is no number")
        return JoinRequest(**texts, protocol=found["protocol"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CallerError(
            "this is no request to join a cluster", action="run the same pscluster version on every host"
        ) from None


def pack_answer(answer: JoinAnswer | PsError) -> bytes:
    """The line of an answer."""
    return _line({"error": answer.to_dict()} if isinstance(answer, PsError) else asdict(answer))


def unpack_answer(line: bytes, address: str) -> JoinAnswer:
    """The answer of the endpoint at `address`. Raises the error that it holds; AuthError for anything else."""
    try:
        found = json.loads(line)
        if "error" in found:
            raise errors.from_dict(found["error"])
        return JoinAnswer(
            authority_pem=_text(found["authority_pem"]), certificate_pem=_text(found.get("certificate_pem", ""))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise AuthError(f"{address} does not answer as a master's join endpoint does") from None


def _line(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _text(value: object) -> str:
    """Raises TypeError for what is no text, ValueError for half a surrogate pair."""
    if not isinstance(value, str):
        raise TypeError("it is no text")
    value.encode()
    return value
