"""Join tokens: a secret to become a member, with the hash of the authority that the new member must find."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field

from pscluster.errors import AuthError
from pscluster.security.identity import JOINABLE, Role

_PREFIX = "psj1-"
_MAX_CHARS = 4096


@dataclass(frozen=True, kw_only=True)
class JoinToken:
    """`secret`: known to the token's holder; the master keeps `digest`. `authority_sha256`: hex. `addresses`: where the
    master takes joins, "host:port", to be tried in order. `master`: where it takes members."""

    secret: str = field(repr=False)
    authority_sha256: str
    cluster_id: str
    role: Role
    addresses: tuple[str, ...]
    master: str = ""

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the secret."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def encode(self) -> str:
        """One word of letters, digits, '-' and '_'."""
        text = json.dumps(asdict(self), separators=(",", ":"))
        return _PREFIX + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """The inverse of `encode`. Raises AuthError, which does not repeat the text."""
        text = text.strip()
        try:
            if not text.startswith(_PREFIX) or len(text) > _MAX_CHARS:
                raise ValueError("it does not begin with " + _PREFIX)
            body = text.removeprefix(_PREFIX)
            found = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            made = cls(**{**found, "role": Role(found["role"]), "addresses": tuple(found["addresses"])})
            words = (made.secret, made.authority_sha256, made.cluster_id, made.master, *made.addresses)
            if not all(isinstance(word, str) for word in words) or not made.addresses or made.role not in JOINABLE:
                raise ValueError("a part of it is of another type")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = str(error) if str(error).startswith("it ") else "it is incomplete"
            raise AuthError(
                f"this is not a join token: {reason}", action="copy all of what `psctl token create` printed"
            ) from None
        return made
