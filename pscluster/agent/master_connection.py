"""The agent's stream to the master, reopened whenever it breaks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import grpc
import structlog

from pscluster.agent import metrics, resources
from pscluster.agent.addresses import NodeAddress, interfaces
from pscluster.agent.probe.prober import Prober
from pscluster.agent.report_queue import ReportQueue
from pscluster.agent.supervisor import Supervisor
from pscluster.errors import AuthError, PsError, SettingsError, StateError, UnreachableError
from pscluster.rpc import DEADLINE_S, TRANSFER_DEADLINE_S, Access, error_of, open_aio_channel
from pscluster.security.credentials import Credentials
from pscluster.v1.agents_pb2 import (
    AgentMessage,
    DownloadBundleRequest,
    FindUnusedRequest,
    Hello,
    NodeBeat,
    RegisterRequest,
)
from pscluster.v1.agents_pb2_grpc import AgentsStub
from pscluster.wire.backoff import delay_s

SILENCE_S = 6.0
"""The master answers every heartbeat. Without a message from it for this long the stream is reopened: on a network that
carries only the agent's messages, the node would get no assignments while the master considers it connected."""
_JOIN_AGAIN = (
    "to let this node back in, remove `identity` in its state directory, and start it with --join and a new token "
    "(psctl token create)"
)
_log = structlog.get_logger(__name__)


class MasterConnection:
    """Registers the node, sends heartbeats and queued messages, applies assignments. Used from the agent's loop."""

    def __init__(self, master: str, access: Access, node: RegisterRequest, location: NodeAddress) -> None:
        """`node` is registered, with the addresses that `location` finds each time."""
        self._address = master
        self._access = access
        self._node = node
        self._location = location
        self._queue = ReportQueue()
        self._queued = asyncio.Event()
        self.flushed = asyncio.Event()
        """Set while the master has acknowledged everything."""
        self.flushed.set()
        self.disconnected = asyncio.Event()
        """Set while no stream is open."""
        self.disconnected.set()
        self._failures = 0
        self._reported: tuple[str, str] | None = None

    def emit(self, message: AgentMessage) -> None:
        """Queue a durable message. It reaches the master at least once, in order, unless a newer one supersedes it (see
        `ReportQueue`). Never blocks."""
        self._queue.add(message)
        self.flushed.clear()
        self._queued.set()
        self._measure()

    @property
    def connected(self) -> bool:
        return not self.disconnected.is_set()

    def log_bytes(self) -> int:
        """Bytes of output that the master has not acknowledged."""
        return self._queue.log_bytes

    async def run(self, supervisor: Supervisor, prober: Prober) -> None:
        """Keep a stream open and pass assignments to `supervisor`, orders to measure to `prober`; never returns. Raises
        StateError when a newer incarnation of this node has registered, AuthError when this node's certificate is
        revoked."""
        while True:
            try:
                await self._session(supervisor, prober)
                continue  # at once, with the newer certificate
            except grpc.RpcError as failure:
                error = error_of(failure, address=self._address)
                if isinstance(error, AuthError) and error.details.get("reason") == "revoked":
                    error.action = _JOIN_AGAIN
                    raise error from None
                self._log_outage(error)
            except (UnreachableError, SettingsError) as error:
                self._log_outage(error)
            self._failures += 1
            await asyncio.sleep(delay_s(self._failures, random.random()))

    async def download_bundle(self, sha256: str) -> AsyncIterator[bytes]:
        """The chunks of a code bundle. Raises PsError."""
        async with open_aio_channel(self._address, self._access) as channel:
            stub: Any = AgentsStub(channel)  # type: ignore[no-untyped-call]
            try:
                request = DownloadBundleRequest(sha256=sha256)
                async for chunk in stub.DownloadBundle(request, timeout=TRANSFER_DEADLINE_S):
                    yield chunk.data
            except grpc.RpcError as failure:
                raise error_of(failure) from None

    async def find_unused(self, bundles: Sequence[str], jobs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        """Of these bundles and jobs, the bundles that no job has, and the jobs that have ended. Raises PsError."""
        async with open_aio_channel(self._address, self._access) as channel:
            stub: Any = AgentsStub(channel)  # type: ignore[no-untyped-call]
            try:
                request = FindUnusedRequest(bundles=bundles, jobs=jobs)
                reply = await stub.FindUnused(request, timeout=DEADLINE_S)
            except grpc.RpcError as failure:
                raise error_of(failure) from None
        return reply.bundles, reply.jobs

    async def _session(self, supervisor: Supervisor, prober: Prober) -> None:
        """One registration and one stream, until its certificate is replaced or expires, or it breaks: grpc.RpcError,
        UnreachableError, SettingsError when this node has no address, StateError when superseded."""
        await self._locate(supervisor)
        used = self._access.source.get() if self._access.source is not None else None
        async with open_aio_channel(self._address, self._access) as channel:
            stub: Any = AgentsStub(channel)  # type: ignore[no-untyped-call]
            beat_interval_s = await self._register(stub)
            call = stub.Attend()
            hello = Hello(node_id=self._node.node_id, incarnation=self._node.incarnation, processes=supervisor.states())
            await call.write(AgentMessage(hello=hello))
            sender = asyncio.create_task(self._send(call, supervisor, beat_interval_s))
            try:
                await self._receive(call, supervisor, prober, used)
            finally:
                self._set_connected(False)
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
                call.cancel()

    async def _locate(self, supervisor: Supervisor) -> None:
        """Look where this node is: it may have another address than before the stream broke."""
        if self._access.source is not None:
            host = await asyncio.to_thread(self._location.locate)
            self._node.advertised_host = host
            if self._node.depot_address:
                self._node.depot_address = f"{host}:{self._node.depot_address.rpartition(':')[2]}"
        supervisor.relocate(self._node.depot_address, await asyncio.to_thread(interfaces))

    async def _register(self, stub: Any) -> float:
        """Register the node; returns the seconds between heartbeats."""
        try:
            reply = await stub.Register(self._node, timeout=DEADLINE_S)
        except grpc.RpcError as failure:
            error = error_of(failure)
            if isinstance(error, StateError):
                raise error from None
            raise
        return float(reply.beat_interval_s) or 1.0

    async def _receive(self, call: Any, supervisor: Supervisor, prober: Prober, used: Credentials | None) -> None:
        """Returns when the stream must be opened again because `used`, its certificate, was replaced or expires."""
        while used is None or not self._is_outdated(used):
            try:
                async with asyncio.timeout(SILENCE_S):
                    message = await call.read()
            except TimeoutError:
                raise UnreachableError(f"no message from the master for {SILENCE_S:g} s") from None
            if message is grpc.aio.EOF:
                await self._raise_end(call)
            if not self.connected:
                self._set_connected(True)
            if message.HasField("assignment"):
                supervisor.apply(message.assignment)
            if message.HasField("probe"):
                prober.handle(message.probe, self._node.advertised_host, busy=not supervisor.is_empty)
            if message.HasField("ack"):
                self._queue.acknowledge(message.ack.sequence)
                if not len(self._queue):
                    self.flushed.set()
                self._measure()

    def _is_outdated(self, used: Credentials) -> bool:
        assert self._access.source is not None, "a certificate was used"
        return self._access.source.get() is not used or time.time() >= used.not_after_s

    async def _raise_end(self, call: Any) -> NoReturn:
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )
        raise UnreachableError("the master closed the stream")

    async def _send(self, call: Any, supervisor: Supervisor, beat_interval_s: float) -> None:
        """Send everything unacknowledged, then what is added, one message at a time since the next may be superseded
        meanwhile, and heartbeats in between, until the call ends."""
        loop = asyncio.get_running_loop()
        sent = 0
        beat_at = loop.time()
        while not call.done():
            self._queued.clear()
            waiting = self._queue.after(sent, 1)
            for message in waiting:
                await call.write(message)
                sent = message.sequence
            if loop.time() >= beat_at:
                await call.write(AgentMessage(beat=_heartbeat(supervisor)))
                beat_at = loop.time() + beat_interval_s
            if not waiting:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._queued.wait(), max(0.0, beat_at - loop.time()))

    def _measure(self) -> None:
        metrics.QUEUED_MESSAGES.set(len(self._queue))
        metrics.DROPPED_MESSAGES.set(self._queue.num_dropped)

    def _set_connected(self, connected: bool) -> None:
        if connected:
            self._failures = 0
            self._reported = None
            self.disconnected.clear()
            _log.info("connected to the master", address=self._address)
        else:
            self.disconnected.set()
        metrics.MASTER_CONNECTED.set(int(connected))

    def _log_outage(self, error: PsError) -> None:
        """Log an outage once for each reason, not at every retry."""
        reason = error.details.get("reason", "")
        if self._reported != (error.code, reason):
            self._reported = (error.code, reason)
            _log.warning(
                "waiting for the master", address=self._address, code=error.code, reason=reason, cause=error.cause
            )


def _heartbeat(supervisor: Supervisor) -> NodeBeat:
    return NodeBeat(
        sent_s=time.time(), memory_available_bytes=resources.memory_available_bytes(), speeds=supervisor.speeds()
    )
