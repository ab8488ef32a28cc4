"""The master put together: lock, store, core, gRPC, metrics; and taken apart again."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from pscluster import rpc, telemetry
from pscluster.errors import StorageError
from pscluster.security.credentials import write_private
from pscluster.settings import token_file
from pscluster.v1 import access_pb2_grpc, agents_pb2_grpc, jobs_pb2_grpc
from psmaster.api.access import AccessService
from psmaster.api.agents import AgentsService
from psmaster.api.jobs import JobsService
from psmaster.api.metrics import MasterMetrics
from psmaster.control.loop import ControlLoop
from psmaster.control.security import LIFETIME_S, ClusterSecurity, open_security
from psmaster.listening import Listening, check_address, refuse_exposed
from psmaster.scheduling.draft import Limits
from psmaster.storage.bundles import BundleShelf
from psmaster.storage.orphans import may_go, refuse_unclaimed
from psmaster.storage.persistence import Archive
from psmaster.storage.sqlite import DATABASE, SqliteStore
from psmaster.storage.store import Batch

UNCLAIMED_S = 24 * 3600.0  # a bundle that no job names is removed after this long
_log = structlog.get_logger(__name__)
MAX_LIFETIME_S = 366 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class MasterSettings:
    """`listen`: "unix:/path" or "host:port", each; a host that others reach only in a cluster with certificates (see
    `psctl certs init`). `token_file` None: "token" in the state directory, made where it is missing. `join_listen`
    None: the first TCP address, with the next port."""

    state_dir: Path
    token_file: Path | None = None
    listen: tuple[str, ...] = ("127.0.0.1:7070",)
    join_listen: str | None = None
    metrics_listen: str = "127.0.0.1:0"
    certificate_lifetime_s: float = LIFETIME_S  # of members; they renew them before they expire
    data_security: str = "tls"  # of data connections over TCP; "plain": TLS for their handshake alone
    suspicion_s: float = 3.0  # of silence, after which a node is taken for dead
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not self.listen:
            raise ValueError("listen names no address")
        for address in (*self.listen, *filter(None, [self.join_listen])):
            check_address(address)
        if self.join_listen is not None and self.join_listen.startswith("unix:"):
            raise ValueError("join_listen must be a TCP address: who joins is on another host")
        if not 0.5 <= self.suspicion_s <= 3600:
            raise ValueError(f"suspicion_s must lie between 0.5 and 3600, not {self.suspicion_s:g}")
        lifetime_s = self.certificate_lifetime_s
        if not 10 <= lifetime_s <= MAX_LIFETIME_S:
            raise ValueError(f"certificate_lifetime_s must lie between 10 and {MAX_LIFETIME_S:g}, not {lifetime_s:g}")
        if self.data_security not in ("tls", "plain"):
            raise ValueError(f"data_security is {self.data_security!r}, neither tls nor plain")


async def serve(settings: MasterSettings) -> None:
    """Be the master until SIGTERM or SIGINT. Raises PsError when it cannot start, or met a bug of ours."""
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    async with assembled(settings) as (core, health):
        await run_transactions(core, health, ending)


@asynccontextmanager
async def assembled(settings: MasterSettings) -> AsyncIterator[tuple[ControlLoop, Any]]:
    """The master, which listens and has its state, and its health service; `run_transactions` makes it work.
    Everything is released at the end. Raises PsError when it cannot start."""
    async with AsyncExitStack() as stack:
        lock = claim(settings.state_dir)
        stack.callback(lock.close)
        token = read_token(settings)
        security = open_security(settings.state_dir, settings.certificate_lifetime_s, settings.data_security)
        if not security.secured:
            refuse_exposed(settings.listen, settings.state_dir)
        shelf = BundleShelf(settings.state_dir / "bundles")
        core = await _load(stack, settings, security, shelf)
        metrics = MasterMetrics(core)
        stack.callback(metrics.close)
        endpoint = telemetry.MetricsEndpoint(settings.metrics_listen)
        stack.callback(endpoint.close)
        health = health_aio.HealthServicer()
        listening = Listening(stack, core, token, settings.listen, settings.join_listen)
        addresses = listening.addresses
        jobs = JobsService(core, shelf, endpoint.address, addresses)
        await listening.serve(
            partial(jobs_pb2_grpc.add_JobsServicer_to_server, jobs),
            partial(agents_pb2_grpc.add_AgentsServicer_to_server, AgentsService(core, shelf)),
            partial(access_pb2_grpc.add_AccessServicer_to_server, AccessService(core, addresses)),
            partial(health_pb2_grpc.add_HealthServicer_to_server, health),
        )
        _log.info(
            "serves",
            listen=list(addresses.listening),
            joins=list(addresses.joins),
            metrics=endpoint.address,
            jobs=len(core.state.jobs),
            cluster=security.cluster_id,
            secured=security.secured,
        )
        yield core, health


def read_token(settings: MasterSettings) -> str:
    """The cluster's token; one is made where the settings name none and there is none. Raises AuthError,
    StorageError."""
    path = settings.token_file or token_file(settings.state_dir)
    if settings.token_file is None and not path.exists():
        try:
            write_private(path, f"{secrets.token_urlsafe(32)}\n".encode())
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from None
    return rpc.read_token(path)


async def _load(
    stack: AsyncExitStack, settings: MasterSettings, security: ClusterSecurity, shelf: BundleShelf
) -> ControlLoop:
    refuse_unclaimed(settings.state_dir)
    archive = Archive(SqliteStore(settings.state_dir / DATABASE), settings.state_dir)
    core = ControlLoop(archive, Limits(suspicion_s=settings.suspicion_s), security=security)
    stack.push_async_callback(core.close)
    await core.load()
    await core.on_disk(tidy, core, shelf, settings.state_dir / "jobs")
    return core


def tidy(core: ControlLoop, shelf: BundleShelf, jobs_directory: Path) -> None:
    """Remove what nothing refers to: files of deleted jobs, bundles that were never used. Blocks."""
    for directory in jobs_directory.iterdir() if jobs_directory.is_dir() else ():
        if may_go(directory, core.state.jobs, core.state.deletions):
            shutil.rmtree(directory, ignore_errors=True)
    store = core.archive.store
    used = {job.bundle_sha256 for job in core.state.jobs.values()}
    unclaimed = [
        bundle.sha256
        for bundle in store.bundles()
        if bundle.sha256 not in used and core.now().unix_s - bundle.created_s > UNCLAIMED_S
    ]
    for sha256 in unclaimed:
        shelf.remove(sha256)
    store.write(Batch(deleted_bundles=tuple(unclaimed)))


async def run_transactions(core: ControlLoop, health: Any, ending: asyncio.Event) -> None:
    """Commit transactions until `ending`. Whatever ends the loop ends the master: a supervisor restarts it."""
    running = asyncio.create_task(core.run())
    ended = asyncio.create_task(ending.wait())
    for service in ("", "ready"):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        _log.info("ends")
    finally:
        await health.enter_graceful_shutdown()
        core.close_streams()
        for task in (running, ended):
            task.cancel()
        await asyncio.gather(running, ended, return_exceptions=True)


def claim(state_dir: Path) -> IO[str]:
    """Create the state directory and lock it for this process; closing the file unlocks it. Raises StorageError when
    it cannot be written or another master has it."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("a+")
    except OSError as error:
        raise StorageError(f"cannot write in {state_dir}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise StorageError(
            f"another master (pid {holder}) uses {state_dir}", action="stop it, or give another --state-dir"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
