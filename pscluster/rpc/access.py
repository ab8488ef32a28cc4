"""Who may call what: one table for all services, and who calls. Pure.

A caller shows a certificate over TCP, or the cluster's token over a Unix socket (in a cluster without certificates over
loopback, too). The token's holder is an administrator of this machine, "local", and may call everything. gRPC health is
open. What a role may call, a caller may still be refused for what it asks: services look at `CALLER`."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache

from pscluster.errors import AuthError
from pscluster.security.credentials import identity_in, parse_certificate, serial_of
from pscluster.security.identity import Role

OPEN_SERVICE = "/grpc.health.v1.Health/"
_NODES = frozenset({Role.WORKER, Role.SERVER})
_SERVERS = frozenset({Role.SERVER})
_PEOPLE = frozenset({Role.USER, Role.ADMIN})
_ADMINS = frozenset({Role.ADMIN})

ROLES: Mapping[str, frozenset[Role]] = {
    "/pscluster.v1.Jobs/Submit": _PEOPLE,
    "/pscluster.v1.Jobs/HasBundle": _PEOPLE,
    "/pscluster.v1.Jobs/UploadBundle": _PEOPLE,
    "/pscluster.v1.Jobs/Get": _PEOPLE,
    "/pscluster.v1.Jobs/List": _PEOPLE,
    "/pscluster.v1.Jobs/Watch": _PEOPLE,
    "/pscluster.v1.Jobs/Stop": _PEOPLE,
    "/pscluster.v1.Jobs/Resume": _PEOPLE,
    "/pscluster.v1.Jobs/Delete": _PEOPLE,
    "/pscluster.v1.Jobs/ReadLogs": _PEOPLE,
    "/pscluster.v1.Jobs/ReadMetrics": _PEOPLE,
    "/pscluster.v1.Jobs/ListSnapshots": _PEOPLE,
    "/pscluster.v1.Jobs/ListNodes": _PEOPLE,
    "/pscluster.v1.Jobs/Drain": _ADMINS,
    "/pscluster.v1.Jobs/GetCluster": _PEOPLE,
    "/pscluster.v1.Jobs/Probe": _ADMINS,  # it slows down everybody's jobs
    "/pscluster.v1.Agents/Register": _NODES,
    "/pscluster.v1.Agents/Attend": _NODES,
    "/pscluster.v1.Agents/DownloadBundle": _NODES | _PEOPLE,  # to export or evaluate a job of one's own
    "/pscluster.v1.Agents/FindUnused": _NODES,
    "/pscluster.v1.Access/CreateToken": _ADMINS,
    "/pscluster.v1.Access/ListTokens": _ADMINS,
    "/pscluster.v1.Access/RevokeToken": _ADMINS,
    "/pscluster.v1.Access/ListCertificates": _ADMINS,
    "/pscluster.v1.Access/RevokeCertificates": _ADMINS,
    "/pscluster.v1.Access/Renew": _NODES | _PEOPLE,
    "/pscluster.v1.Depot/TakePart": _SERVERS,
    "/pscluster.v1.Depot/GetPart": _SERVERS | _PEOPLE,  # to export; a depot does not know whose job it is
}
"""By method. A method that is missing here is refused to every certificate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who calls. `local`: by the token. Else by the certificate `serial`, valid until the Unix time `expires_s`."""

    role: Role
    name: str
    local: bool = False
    serial: str = field(default="", repr=False)
    expires_s: float = 0.0

    @property
    def is_user(self) -> bool:
        """It may see and change its own jobs alone."""
        return self.role is Role.USER

    @property
    def is_node(self) -> bool:
        """It speaks for one node alone, which has its name."""
        return self.role in _NODES

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


LOCAL = Caller(role=Role.ADMIN, name="local", local=True)
CALLER: ContextVar[Caller] = ContextVar("CALLER")
"""Of the call that is being served."""


def caller_of(certificate_pem: bytes, cluster_id: str) -> Caller:
    """The caller that showed a certificate, which TLS has verified. Raises AuthError for one of another cluster, or
    without an identity."""
    caller, cluster = _parse(certificate_pem)
    if cluster != cluster_id:
        raise AuthError(
            f"{caller} is a member of cluster {cluster}, this is cluster {cluster_id}",
            action="use the credentials of this cluster",
            details={"missing": "cluster", "caller": str(caller)},
        )
    return caller


@lru_cache(maxsize=4096)
def _parse(certificate_pem: bytes) -> tuple[Caller, str]:
    certificate = parse_certificate(certificate_pem)
    identity = identity_in(certificate)
    return Caller(
        role=identity.role,
        name=identity.name,
        serial=serial_of(certificate),
        expires_s=certificate.not_valid_after_utc.timestamp(),
    ), identity.cluster_id


def require_role(caller: Caller, method: str) -> None:
    """Raises AuthError unless the caller may call `method`, "/package.Service/Method"."""
    allowed = ROLES.get(method, frozenset())
    if caller.local or caller.role in allowed:
        return
    needed = " or ".join(sorted(allowed)) or "nobody's"
    name = method.rpartition("/")[2]
    raise AuthError(
        f"{caller} may not call {name}: it needs the role {needed}",
        action=f"use credentials of the role {needed}" if allowed else "run the same pscluster version everywhere",
        details={"missing": "role", "caller": str(caller), "method": name, "needs": needed},
    )


def require_node(caller: Caller, node_id: str, role: Role | None = None) -> None:
    """Raises AuthError unless the caller may speak for a node, in that role. The token's holder may for any."""
    if caller.local or (caller.is_node and caller.name == node_id and role in (None, caller.role)):
        return
    raise AuthError(
        f"{caller} may not speak for node {node_id[:80]!r}" + (f" as a {role}" if role is not None else ""),
        action="start the daemon with the --node-id and of the role that its certificate names",
        details={"missing": "node", "caller": str(caller), "node": node_id[:80]},
    )


def revoked(caller: Caller) -> AuthError:
    return AuthError(
        f"the certificate of {caller} was revoked",
        action="join again with a new token: psctl token create",
        details={"missing": "valid certificate", "caller": str(caller), "reason": "revoked"},
    )


def expired(caller: Caller) -> AuthError:
    return AuthError(
        f"the certificate of {caller} has expired",
        action="connect again with the renewed one; or join again with a new token",
        details={"missing": "valid certificate", "caller": str(caller), "reason": "expired"},
    )
