"""Who a certificate speaks for: a URI in its subject alternative name, `pscluster://CLUSTER/ROLE/NAME`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from pscluster.errors import AuthError

_CLUSTER = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,199}")


class Role(StrEnum):
    """What a member is. A process is a trainer or partition of a job: its name is its process id."""

    MASTER = "master"
    WORKER = "worker"
    SERVER = "server"
    USER = "user"
    ADMIN = "admin"
    PROCESS = "process"


JOINABLE = (Role.WORKER, Role.SERVER, Role.USER, Role.ADMIN)
"""The roles that a join token can give."""
LISTENING = (Role.MASTER, Role.SERVER)
"""The roles that serve gRPC over TCP, whose certificates have a DNS name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """`cluster_id`: 16 hex digits. `name`: node id, name of a user, process id, or "master".

    Raises AuthError for a cluster id or a name that cannot be in a certificate."""

    cluster_id: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        if not _CLUSTER.fullmatch(self.cluster_id):
            raise AuthError(f"{self.cluster_id[:40]!r} is not the id of a cluster", details={"field": "cluster_id"})
        slashes = 2 if self.role is Role.PROCESS else 0
        if not _NAME.fullmatch(self.name) or self.name.count("/") != slashes:
            raise AuthError(
                f"{self.name[:80]!r} cannot be the name of a {self.role}: letters, digits, '.', '_', '@' and '-'",
                action="choose another name",
                details={"field": "name"},
            )

    @property
    def uri(self) -> str:
        return f"pscluster://{self.cluster_id}/{self.role}/{self.name}"

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """The inverse of `uri`. Raises AuthError."""
        scheme, _, rest = uri.partition("://")
        parts = rest.split("/", 2)
        if scheme != "pscluster" or len(parts) != 3 or parts[1] not in list(Role):
            raise AuthError(f"{uri[:120]!r} is not an identity of a cluster", details={"field": "uri"})
        return cls(cluster_id=parts[0], role=Role(parts[1]), name=parts[2])


def dns_name_of(role: Role) -> str:
    """The DNS name in the certificates of a listening role, which its callers demand: no other member can pose as the
    master, or as a server's depot."""
    return f"{role}.pscluster"
