"""Certificates for tests: authorities for the life of this process, and what they issue."""

from __future__ import annotations

import datetime
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pscluster.security.authority
from pscluster.security.authority import Authority
from pscluster.security.credentials import Credentials, CredentialSource
from pscluster.security.identity import Identity, Role
from pscluster.v1.plan_pb2 import Credentials as CredentialsMessage
from pscluster.wire.tls import DataSecurity

CLUSTER = "00c1a57e00c1a57e"


def authority(cluster_id: str = CLUSTER, key: int = 0) -> Authority:
    """Of a cluster; another `key` gives another authority that says it is of the same one."""
    return _authority(cluster_id, key)


@functools.cache
def _authority(cluster_id: str, key: int) -> Authority:
    with tempfile.TemporaryDirectory() as directory:
        return Authority.create(Path(directory) / f"certs-{key}", cluster_id)


def credentials(
    name: str, role: Role = Role.PROCESS, *, cluster_id: str = CLUSTER, key: int = 0, of: Authority | None = None
) -> Credentials:
    """New ones, for an hour. `of`: the authority, where it signs for another cluster than its own."""
    identity = Identity(cluster_id=cluster_id, role=role, name=name)
    return (of or authority(cluster_id, key)).issue(identity, 3600.0)


def expired(name: str) -> Credentials:
    """Of a process, since yesterday."""
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    clock = SimpleNamespace(now=lambda _: yesterday)
    past = SimpleNamespace(datetime=clock, timedelta=datetime.timedelta, UTC=datetime.UTC)
    with mock.patch.object(pscluster.security.authority, "datetime", past):
        return credentials(name)


def trusting(held: Credentials, other: Credentials) -> Credentials:
    """The same certificate, with the other's authority: its holder takes the other for a member."""
    return Credentials(key_pem=held.key_pem, certificate_pem=held.certificate_pem, authority_pem=other.authority_pem)


def security(held: str | Credentials, *, encrypts: bool = True) -> DataSecurity:
    """Of the process with this id, or these credentials."""
    return DataSecurity(CredentialSource(credentials(held) if isinstance(held, str) else held), encrypts=encrypts)


def message(held: Credentials) -> CredentialsMessage:
    """As an agent hands them over."""
    return CredentialsMessage(
        key_pem=held.key_pem, certificate_pem=held.certificate_pem, authority_pem=held.authority_pem
    )
