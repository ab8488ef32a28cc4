"""Gathers what `psctl doctor` judges: on this host, from the master, and by dialling what nodes advertise."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pscluster
from pscluster.agent.resources import visible_devices
from pscluster.cli.doctor.checks import CertificateFact, Dialled, Disk, Facts
from pscluster.client import Cluster
from pscluster.client.credentials import access_to
from pscluster.client.reach import check_reachable
from pscluster.errors import AuthError, PsError
from pscluster.security.identity import Role
from pscluster.settings import LocatedCluster, client_config_file

if TYPE_CHECKING:
    from pscluster.rpc import Access

_DIALLERS = 16


def gather(located: LocatedCluster, environ: Mapping[str, str]) -> Facts:
    """All facts. Blocks; raises nothing for a cluster that is ill or away: that is a fact."""
    facts = Facts(
        now_s=time.time(),
        version=pscluster.__version__,
        hostname=socket.gethostname(),
        address=located.address,
        disks=_disks(located, environ),
        certificates=(*_own(located), *_authority(located.state_dir)),
        gpus_here=len(visible_devices(environ)),
    )
    try:
        with Cluster.connect_to(located) as cluster:
            return dataclasses.replace(facts, **_of_cluster(cluster, access_to(located)))
    except PsError as error:
        return dataclasses.replace(facts, failure=error)


def _of_cluster(cluster: Cluster, access: Access) -> dict[str, Any]:
    sent, began = time.time(), time.monotonic()
    health = cluster.health()
    round_trip_s = time.monotonic() - began
    found: dict[str, Any] = {"health": health, "round_trip_s": round_trip_s}
    found["clock_offset_s"] = health.time_s - (sent + round_trip_s / 2) if health.time_s else None
    nodes = cluster.nodes()
    dialled = [(f"the depot of {node.node_id}", node.depot_address) for node in nodes if node.depot_address]
    if not health.secured:
        return found | {"nodes": tuple(nodes), "dialled": _dial(dialled, access, ())}
    from pscluster.security.credentials import RENEW_AT  # loads cryptography

    try:
        certificates = tuple(
            CertificateFact(
                owner=f"{item.role} {item.name}",
                expires_s=item.expires_s,
                renew_at_s=item.issued_s + (item.expires_s - item.issued_s) * RENEW_AT,
            )
            for item in _newest(cluster)
        )
        found["certificates"] = certificates
    except AuthError as error:
        found["unread"] = (("certificates", error.cause),)
    return found | {"nodes": tuple(nodes), "dialled": _dial(dialled, access, health.join_addresses)}


def _newest(cluster: Cluster) -> list[Any]:
    """The newest valid certificate of each member: older ones expire as they should."""
    newest = {(item.role, item.name): item for item in cluster.members.certificates() if not item.revoked}
    return list(newest.values())


def _dial(depots: list[tuple[str, str]], access: Access, joins: tuple[str, ...]) -> tuple[Dialled, ...]:
    """Each depot as a client of it, each join endpoint by TCP alone, at once."""
    asked: list[tuple[str, str, Access | None, Role]] = [(*depot, access, Role.SERVER) for depot in depots]
    asked += [("the join endpoint", address, None, Role.MASTER) for address in joins]
    with ThreadPoolExecutor(_DIALLERS) as threads:
        return tuple(threads.map(lambda one: _dial_one(*one), asked))


def _dial_one(what: str, address: str, access: Access | None, server: Role) -> Dialled:
    try:
        check_reachable(address, access, server, what)
    except PsError as error:
        return Dialled(what=what, address=address, error=error)
    return Dialled(what=what, address=address, error=None)


def _own(located: LocatedCluster) -> tuple[CertificateFact, ...]:
    """The user's certificate. One that cannot be read is what keeps psctl from connecting, and is found there."""
    if located.credentials_dir is None or not located.credentials_dir.is_dir():
        return ()
    from pscluster.security.credentials import Credentials

    try:
        own = Credentials.load(located.credentials_dir)
    except AuthError:
        return ()
    return (
        CertificateFact(owner=f"{own.identity.name} (this user)", expires_s=own.not_after_s, renew_at_s=own.renew_at_s),
    )


def _authority(state_dir: Path) -> tuple[CertificateFact, ...]:
    """The authority, if the master's state is on this host."""
    from pscluster.security.authority import CERTIFICATE
    from pscluster.security.credentials import parse_certificate

    found = []
    for directory in (state_dir / "certs", state_dir / "master" / "certs"):
        if (directory / CERTIFICATE).is_file():
            expires = parse_certificate((directory / CERTIFICATE).read_bytes()).not_valid_after_utc
            found.append(
                CertificateFact(owner="the certificate authority", expires_s=expires.timestamp(), renew_at_s=None)
            )
    return tuple(found)


def _disks(located: LocatedCluster, environ: Mapping[str, str]) -> tuple[Disk, ...]:
    """The file systems of the local cluster's state and of psctl's settings."""
    wanted = [(located.state_dir, "the local cluster")] if located.local else []
    wanted.append((client_config_file(environ).parent, "contexts"))
    found, seen = [], set()
    for path, purpose in wanted:
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if (device := os.stat(there).st_dev) not in seen:
            seen.add(device)
            usage = shutil.disk_usage(there)
            found.append(Disk(path=str(path), purpose=purpose, free_bytes=usage.free, total_bytes=usage.total))
    return tuple(found)
