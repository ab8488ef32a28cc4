"""The bodies of the data plane's frames as typed values; the only place (with `partition_protocol`) where they
are packed and unpacked.

    HELLO                Hello, in JSON
    WELCOME              Welcome of a partition, StandbyWelcome of a standby; in JSON
    ACK                  Ack
    DIRECTIVE            Directive, in JSON
    STATISTICS, MERGED   float64s: pack_statistics
    OUTCOME              Outcome, in JSON
    AUDIT                LeafDigest
    VOTE, JOIN           Vote, Join; see partition_protocol, as for
    DECISION             CommitDecision, in JSON
    SYNC, METADATA       Sync, Metadata; in JSON
    INIT, VALUES, PIECE  words of a bucket
    PUSH                 words of a bucket, a weight (UNCHANGED: pack_weight) or a step.tree.Summary
    PULL, FENCED, HELD,
    ARBITRATE            none

Generation, step, bucket, node and sender travel in the header. Every `unpack` raises FrameError for a body that `pack`
does not produce. Free of torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np

from pscluster.errors import AuthError, FrameError
from pscluster.step.tree import Statistics
from pscluster.wire.frame import Buffer, FrameKind, Header

Channel = Literal["push", "pull", "vote", "replica"]
"""What a connection carries: gradients, values, votes, or the state of a partition to its standby."""
Action = Literal["train", "evaluate", "finish", "hold"]

MAX_HELLO_BYTES = 4096
_JSON_TYPES = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


def refusal(what: str, why: object) -> FrameError:
    """The error for a body that is not the JSON it should be."""
    return FrameError(f"a {what} does not parse: {why}", details={"field": "body"})


def mapping_of(body: Buffer, what: str) -> dict[str, Any]:
    """A body as the JSON mapping that it must be."""
    try:
        found = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise refusal(what, error) from None
    if not isinstance(found, dict):
        raise refusal(what, "it is no mapping")
    return found


def check_choice(choices: object, value: object, what: str) -> None:
    """Refuse a value that a Literal type does not list."""
    if value not in get_args(choices):
        raise refusal(what, f"{value!r} is none of {', '.join(get_args(choices))}")


def metrics_of(found: object, what: str) -> dict[str, float]:
    """Metrics by name, as a part of a JSON body."""
    try:
        return {str(name): float(value) for name, value in found.items()}  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError) as error:
        raise refusal(what, f"its metrics are {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class JsonBody:
    """A body that is the JSON mapping of its fields, which are numbers, strings and booleans. Python writes floats so
    that they read back exactly."""

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, body: Buffer) -> Self:
        return cls.from_json(mapping_of(body, cls.__name__))

    @classmethod
    def from_json(cls, found: object) -> Self:
        """From a part of a JSON body. Raises FrameError when a field is missing, unknown or of another type."""
        try:
            if not isinstance(found, dict):
                raise TypeError("it is no mapping")
            made = cls(**found)
        except TypeError as error:
            raise refusal(cls.__name__, error) from None
        for declared in fields(cls):
            value = getattr(made, declared.name)
            if type(value) not in _JSON_TYPES.get(str(declared.type), (type(value),)):
                raise refusal(cls.__name__, f"{declared.name} is {value!r:.80}")
        return made


# ---- handshake ----


def process_id(job_id: str, role: str, number: int, attempt: int) -> str:
    """The name of a trainer or partition in its certificate, and to the master."""
    return f"{job_id}/{role}-{number}/{attempt}"


@dataclass(frozen=True, kw_only=True)
class Hello(JsonBody):
    """The first frame of the side that dials.

    `token`: the job's, in hex. `role`: "trainer" or "partition"; `attempt`: which process of its placement it is: over
    TLS the certificate must say the same. `share`: it can map the receiver's memory; `num_lanes`: how many lanes for
    gradients it then asks for. `cluster`: the id of its cluster."""

    token: str
    role: str
    channel: Channel
    attempt: int
    restore_generation: int
    share: bool = False
    num_lanes: int = 0
    cluster: str = ""

    @classmethod
    def unpack(cls, body: Buffer) -> Self:
        """Raises AuthError instead when there is no token: whatever else a stranger sends is not looked at."""
        found = mapping_of(body, cls.__name__)
        if not isinstance(found.get("token"), str):
            raise AuthError("a data connection without the job's token")
        hello = cls.from_json(found)
        check_choice(Channel, hello.channel, cls.__name__)
        return hello


@dataclass(frozen=True, kw_only=True)
class Welcome(JsonBody):
    """A partition accepts. `needs_values`: it has no first values. `num_lanes`: of the lanes whose descriptor comes
    with the frame; 0: none."""

    granted_bytes: int
    open_bucket: int
    needs_values: bool
    num_lanes: int


@dataclass(frozen=True, kw_only=True)
class StandbyWelcome(JsonBody):
    """A standby accepts its partition. `reach`: the version that it can make of what it holds, -1: none. `applied`: the
    version that it has made."""

    reach: int
    applied: int


# ---- gradients ----


class Ack(NamedTuple):
    """What arrived (the node is in the header), None: nothing, the frame only carries credit. `granted_bytes`: how much
    may be sent over this connection, from its beginning. `open_bucket`: the bucket that is waited for first, -1: none;
    only an answer to a PUSH knows it, and one that only carries credit."""

    kind: FrameKind | None
    granted_bytes: int
    open_bucket: int

    def pack(self) -> bytes:
        bucket = self.open_bucket if self.open_bucket >= 0 else _NO_BUCKET
        return _ACK.pack(self.kind or 0, self.granted_bytes, bucket)

    @classmethod
    def unpack(cls, body: Buffer) -> Ack:
        if len(body) != _ACK.size:
            raise FrameError(f"an ACK of {len(body)} bytes", details={"field": "length"})
        kind, granted_bytes, bucket = _ACK.unpack(body)
        try:
            return cls(FrameKind(kind) if kind else None, granted_bytes, -1 if bucket == _NO_BUCKET else bucket)
        except ValueError as error:
            raise refusal("ACK", error) from None


_ACK = struct.Struct("<BQI")  # kind, granted bytes, open bucket
_NO_BUCKET = 0xFFFF_FFFF

_WEIGHT = struct.Struct("<d")
WEIGHT_BYTES = _WEIGHT.size


def pack_weight(weight: float) -> bytes:
    """The body of a PUSH that is UNCHANGED: the weight of its node."""
    return _WEIGHT.pack(weight)


def unpack_weight(body: Buffer) -> float:
    """What `pack_weight` packed; the caller has checked the length."""
    return float(_WEIGHT.unpack(body)[0])


# ---- what trainers are to do, and evaluations ----


@dataclass(frozen=True)
class Directive:
    """What happens at `version`, from the coordinator."""

    generation: int
    version: int
    action: Action

    def pack(self) -> bytes:
        return json.dumps({"action": self.action}).encode()

    @classmethod
    def unpack(cls, header: Header, body: Buffer) -> Directive:
        action = mapping_of(body, cls.__name__).get("action")
        check_choice(Action, action, cls.__name__)
        return cls(header.generation, header.step, action)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The finalised metrics of an evaluation, or the digest of the final values; from the trainer of shard 0."""

    metrics: Mapping[str, float] | None = None
    sha256: str = ""

    def pack(self) -> bytes:
        return json.dumps({"sha256": self.sha256} if self.metrics is None else {"metrics": dict(self.metrics)}).encode()

    @classmethod
    def unpack(cls, body: Buffer) -> Outcome:
        found = mapping_of(body, cls.__name__)
        if "metrics" in found:
            return cls(metrics=metrics_of(found["metrics"], cls.__name__))
        if not isinstance(found.get("sha256"), str):
            raise refusal(cls.__name__, "it has neither metrics nor a digest")
        return cls(sha256=found["sha256"])


_LEAF = struct.Struct("<dd")
_TENSOR_DIGEST = struct.Struct("<II")


@dataclass(frozen=True, kw_only=True)
class LeafDigest:
    """What one microbatch gave, for comparison with another computation of it: its loss and weight, and the CRC-32C of
    the gradient or buffer of each tensor, by its number in the layout."""

    loss_sum: float
    weight: float
    tensors: Mapping[int, int]

    @staticmethod
    def max_bytes(num_tensors: int) -> int:
        """Above the length of every packed one."""
        return _LEAF.size + _TENSOR_DIGEST.size * num_tensors

    def first_difference(self, other: LeafDigest) -> int | str | None:
        """The first tensor whose bits differ, or else "weight" or "loss"; None: everything is the same."""
        for tensor in sorted(self.tensors.keys() | other.tensors.keys()):
            if self.tensors.get(tensor) != other.tensors.get(tensor):
                return tensor
        same_weight = pack_weight(self.weight) == pack_weight(other.weight)  # bit for bit: a NaN equals itself
        same_loss = pack_weight(self.loss_sum) == pack_weight(other.loss_sum)
        return "weight" if not same_weight else "loss" if not same_loss else None

    def pack(self) -> bytes:
        digests = b"".join(_TENSOR_DIGEST.pack(tensor, crc) for tensor, crc in self.tensors.items())
        return _LEAF.pack(self.loss_sum, self.weight) + digests

    @classmethod
    def unpack(cls, body: Buffer) -> LeafDigest:
        if len(body) < _LEAF.size or (len(body) - _LEAF.size) % _TENSOR_DIGEST.size:
            raise FrameError(f"a leaf's digest of {len(body)} bytes", details={"field": "length"})
        loss_sum, weight = _LEAF.unpack_from(body)
        tensors = dict(_TENSOR_DIGEST.iter_unpack(memoryview(body)[_LEAF.size :]))
        return cls(loss_sum=loss_sum, weight=weight, tensors=tensors)


def pack_statistics(statistics: Statistics) -> bytes:
    """The body of STATISTICS and MERGED."""
    return statistics.astype("<f8", copy=False).tobytes()


def unpack_statistics(body: Buffer) -> Statistics:
    """A private copy of the vector. Raises FrameError for a length that is no multiple of 8."""
    if len(body) % 8:
        raise FrameError(f"evaluation statistics of {len(body)} bytes", details={"field": "length"})
    return np.frombuffer(bytes(body), dtype="<f8")
