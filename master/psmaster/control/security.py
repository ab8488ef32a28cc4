"""The cluster's own id, and its certificates where it has them: what the master signs for members and processes."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pscluster.errors import AuthError, StateError
from pscluster.security.authority import CERTIFICATE, Authority, cluster_id_of
from pscluster.security.credentials import BACKDATED_S, Credentials, parse_certificate, serial_of
from pscluster.security.identity import Identity, Role
from psmaster.model.access import CertificateRecord

CERTIFICATES = "certs"  # the authority's directory, in the master's state directory
LIFETIME_S = 7 * 24 * 3600.0  # of a member's certificate
PROCESS_LIFETIME_S = 24 * 3600.0  # of a trainer's or partition's; another one is made at half of it


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where the master is reached. `listening`: "unix:/path" or "host:port", as asked for, with the ports that were
    found. `master`, `joins`: where other hosts reach it, and its join endpoint; empty where they do not."""

    listening: tuple[str, ...] = ()
    master: str = ""
    joins: tuple[str, ...] = ()


@dataclass(kw_only=True)
class ClusterSecurity:
    """`authority` None: the cluster has no certificates. `data_security`: of data connections, "tls" or "plain"; see
    ProcessSpec. Credentials of processes are kept in memory alone. Used from one thread."""

    cluster_id: str = ""
    authority: Authority | None = field(default=None, repr=False)
    lifetime_s: float = LIFETIME_S
    data_security: str = "tls"
    _issued: dict[str, Credentials] = field(default_factory=dict, repr=False)

    @property
    def secured(self) -> bool:
        return self.authority is not None

    def require_authority(self) -> Authority:
        """Raises StateError in a cluster without certificates."""
        if self.authority is None:
            raise StateError(
                "this cluster has no certificates, and so no members on other hosts",
                action="run `psctl certs init` on the master's host, then restart psmaster",
            )
        return self.authority

    def certify(self, csr_pem: bytes, role: Role, name: str) -> tuple[bytes, CertificateRecord]:
        """A certificate for the public key of a request, as PEM, and its record, which must be stored before it is
        handed out. Raises AuthError for a request or a name that is none, StateError without certificates."""
        identity = Identity(cluster_id=self.cluster_id, role=role, name=name)
        pem = self.require_authority().sign(csr_pem, identity, self.lifetime_s)
        made = parse_certificate(pem)
        key = made.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return pem, CertificateRecord(
            serial=serial_of(made),
            role=role,
            name=name,
            key_sha256=hashlib.sha256(key).hexdigest(),
            issued_s=made.not_valid_before_utc.timestamp() + BACKDATED_S,
            expires_s=made.not_valid_after_utc.timestamp(),
        )

    def master_credentials(self) -> Credentials:
        """New ones of the master itself."""
        identity = Identity(cluster_id=self.cluster_id, role=Role.MASTER, name="master")
        return self.require_authority().issue(identity, self.lifetime_s)

    def process_credentials(self, process_id: str, now_s: float) -> Credentials | None:
        """Of a process in an assignment: the same at each call until half of their life is over; None in a cluster
        without certificates."""
        if self.authority is None:
            return None
        held = self._issued.get(process_id)
        # Also where the clock was ahead when they were made: no peer would accept them until then.
        if held is None or not held.not_before_s <= now_s <= held.not_after_s - PROCESS_LIFETIME_S / 2:
            identity = Identity(cluster_id=self.cluster_id, role=Role.PROCESS, name=process_id)
            held = self._issued[process_id] = self.authority.issue(identity, PROCESS_LIFETIME_S)
        return held

    def keep_processes(self, process_ids: Set[str]) -> None:
        """Forget the credentials of all other processes."""
        if not self._issued.keys() <= process_ids:
            self._issued = {key: held for key, held in self._issued.items() if key in process_ids}


NO_CERTIFICATES = ClusterSecurity()


def open_security(state_dir: Path, lifetime_s: float, data_security: str) -> ClusterSecurity:
    """What the master's state directory says; it makes the cluster's id where there is none. Blocks. Raises AuthError,
    StorageError."""
    cluster_id, directory = cluster_id_of(state_dir), state_dir / CERTIFICATES
    authority = Authority.load(directory) if (directory / CERTIFICATE).exists() else None
    if authority is not None and authority.cluster_id != cluster_id:
        raise AuthError(
            f"{directory} is of cluster {authority.cluster_id}, {state_dir} of {cluster_id}",
            action="put back the cluster-id file, or the directory, that belongs here",
        )
    return ClusterSecurity(
        cluster_id=cluster_id, authority=authority, lifetime_s=lifetime_s, data_security=data_security
    )
