"""The master put together: lock, store, core, gRPC, metrics; and taken apart again."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from pscluster import rpc, telemetry
from pscluster.errors import AddressInUseError, StorageError
from pscluster.rpc.server import ErrorInterceptor, TokenInterceptor
from pscluster.v1 import agents_pb2_grpc, jobs_pb2_grpc
from psmaster.api.agents import AgentsService
from psmaster.api.jobs import JobsService
from psmaster.api.metrics import MasterMetrics
from psmaster.control.loop import ControlLoop
from psmaster.scheduling.draft import Limits
from psmaster.storage.bundles import BundleShelf
from psmaster.storage.orphans import may_go, refuse_unclaimed
from psmaster.storage.persistence import Archive
from psmaster.storage.sqlite import DATABASE, SqliteStore
from psmaster.storage.store import Batch

STOP_GRACE_S = 0.5  # how long calls in progress may take when the master ends
UNCLAIMED_S = 24 * 3600.0  # a bundle that no job names is removed after this long
_log = structlog.get_logger(__name__)
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, kw_only=True)
class MasterSettings:
    """`listen`: "unix:/path" or "host:port", each; a host is a loopback one, because nothing encrypts the token yet."""

    state_dir: Path
    token_file: Path
    listen: tuple[str, ...] = ("127.0.0.1:7070",)
    metrics_listen: str = "127.0.0.1:0"
    suspicion_s: float = 3.0  # of silence, after which a node is taken for dead
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not self.listen:
            raise ValueError("listen names no address")
        for address in self.listen:
            self._check(address)
        if not 0.5 <= self.suspicion_s <= 3600:
            raise ValueError(f"suspicion_s must lie between 0.5 and 3600, not {self.suspicion_s:g}")

    def _check(self, address: str) -> None:
        if address.startswith("unix:"):
            if len(address) <= len("unix:") or len(address) > len("unix:") + 107:
                raise ValueError(f"{address!r} is no path that a Unix socket can have (1 to 107 characters)")
            return
        host, separator, port = address.rpartition(":")
        if not separator or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"{address!r} is neither host:port nor unix:/path")
        if host not in _LOOPBACK:
            raise ValueError(f"{address!r} is not a loopback address; other hosts must wait for encrypted connections")


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
        token = rpc.read_token(settings.token_file)
        lock = claim(settings.state_dir)
        stack.callback(lock.close)
        shelf = BundleShelf(settings.state_dir / "bundles")
        core = await _load(stack, settings, shelf)
        metrics = MasterMetrics(core)
        stack.callback(metrics.close)
        endpoint = telemetry.MetricsEndpoint(settings.metrics_listen)
        stack.callback(endpoint.close)
        health = health_aio.HealthServicer()
        services = (JobsService(core, shelf, endpoint.address), AgentsService(core, shelf), health)
        await _listen(stack, settings, token, *services)
        _log.info("serves", listen=list(settings.listen), metrics=endpoint.address, jobs=len(core.state.jobs))
        yield core, health


async def _load(stack: AsyncExitStack, settings: MasterSettings, shelf: BundleShelf) -> ControlLoop:
    refuse_unclaimed(settings.state_dir)
    archive = Archive(SqliteStore(settings.state_dir / DATABASE), settings.state_dir)
    core = ControlLoop(archive, Limits(suspicion_s=settings.suspicion_s))
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


async def _listen(
    stack: AsyncExitStack, settings: MasterSettings, token: str, jobs: JobsService, agents: AgentsService, health: Any
) -> None:
    server = grpc.aio.server(interceptors=[ErrorInterceptor(), TokenInterceptor(token)], options=rpc.SERVER_OPTIONS)
    jobs_pb2_grpc.add_JobsServicer_to_server(jobs, server)  # type: ignore[no-untyped-call]
    agents_pb2_grpc.add_AgentsServicer_to_server(agents, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)  # type: ignore[no-untyped-call]
    for address in settings.listen:
        bind(server, address)
        if address.startswith("unix:"):
            stack.callback(Path(address.removeprefix("unix:")).unlink, missing_ok=True)
    await server.start()
    stack.push_async_callback(server.stop, STOP_GRACE_S)


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


def bind(server: grpc.aio.Server, address: str) -> int:
    """Listen on an address; its port. A socket file that a killed master left is replaced. Raises AddressInUseError
    when another process serves there."""
    if address.startswith("unix:"):
        _replace_stale(Path(address.removeprefix("unix:")))
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressInUseError(f"cannot listen on {address}: it is taken, or not ours", details={}) from error
    if port == 0:
        raise AddressInUseError(f"cannot listen on {address}")
    return port


def _replace_stale(path: Path) -> None:
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise AddressInUseError(f"cannot listen on {path}: {error.strerror}") from None
    raise AddressInUseError(f"{path} is served by another process")
