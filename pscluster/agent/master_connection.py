"""The agent's stream to the master: held open for ever, opened again whenever it breaks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
import structlog

from pscluster.agent import metrics, resources
from pscluster.agent.report_queue import ReportQueue
from pscluster.errors import PsError, StateError, UnreachableError
from pscluster.rpc import DEADLINE_S, TRANSFER_DEADLINE_S, error_of, open_aio_channel
from pscluster.v1.agents_pb2 import (
    AgentMessage,
    Assignment,
    DownloadBundleRequest,
    Hello,
    NodeBeat,
    ProcessState,
    RegisterRequest,
)
from pscluster.v1.agents_pb2_grpc import AgentsStub
from pscluster.v1.plan_pb2 import Speed
from pscluster.wire.backoff import delay_s

SILENCE_S = 6.0
"""The master answers every beat. With no word from it for so long the stream is opened anew: a network that carries
only our words would leave the node without orders, and the master believing that it has them."""
_log = structlog.get_logger(__name__)


class MasterConnection:
    """Registers the node, beats, sends what the outbox holds, and passes on what the master wants.

    Belongs to the agent's loop. `assigned` hears every assignment; `states` says what Hello tells, `speeds` what
    each beat says of trainers.
    """

    def __init__(
        self,
        address: str,
        token: str,
        node: RegisterRequest,
        states: Callable[[], list[ProcessState]],
        assigned: Callable[[Assignment], None],
        speeds: Callable[[], Mapping[str, Speed]] = dict,
    ) -> None:
        self._address = address
        self._token = token
        self._node = node
        self._states = states
        self._assigned = assigned
        self._speeds = speeds
        self._outbox = ReportQueue()
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._away = asyncio.Event()
        self._away.set()
        self._failures = 0
        self._told = ""
        self.connected = False

    def emit(self, message: AgentMessage) -> None:
        """Take a durable message; it reaches the master at least once, in order, unless a newer one makes it void (see
        `ReportQueue`). Never blocks."""
        self._outbox.add(message)
        self._empty.clear()
        self._news.set()
        self._measure()

    def log_bytes(self) -> int:
        """How much output waits for the master's acknowledgement."""
        return self._outbox.log_bytes

    async def flushed(self) -> None:
        """Wait until the master has acknowledged everything."""
        await self._empty.wait()

    async def disconnected(self) -> None:
        """Wait until the stream is not open; returns at once when it is not."""
        await self._away.wait()

    async def run(self) -> None:
        """Attend for ever. Raises StateError when a newer incarnation of this node has taken its place."""
        while True:
            try:
                await self._session()
            except grpc.RpcError as failure:
                self._lost(error_of(failure))
            except UnreachableError as error:
                self._lost(error)
            self._failures += 1
            await asyncio.sleep(delay_s(self._failures, random.random()))

    async def fetch(self, sha256: str) -> AsyncIterator[bytes]:
        """The chunks of a code bundle. Raises PsError."""
        async with open_aio_channel(self._address, self._token) as channel:
            stub: Any = AgentsStub(channel)  # type: ignore[no-untyped-call]
            try:
                request = DownloadBundleRequest(sha256=sha256)
                async for chunk in stub.DownloadBundle(request, timeout=TRANSFER_DEADLINE_S):
                    yield chunk.data
            except grpc.RpcError as failure:
                raise error_of(failure) from None

    async def _session(self) -> None:
        """One registration and one stream, until it breaks.

        Raises grpc.RpcError or UnreachableError for what may mend by itself, StateError when superseded.
        """
        async with open_aio_channel(self._address, self._token) as channel:
            stub: Any = AgentsStub(channel)  # type: ignore[no-untyped-call]
            beat_interval_s = await self._register(stub)
            call = stub.Attend()
            hello = Hello(node_id=self._node.node_id, incarnation=self._node.incarnation, processes=self._states())
            await call.write(AgentMessage(hello=hello))
            sender = asyncio.create_task(self._send(call, beat_interval_s))
            try:
                await self._receive(call)
            finally:
                self._set_connected(False)
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
                call.cancel()

    async def _register(self, stub: Any) -> float:
        """Announce the node; returns the seconds between beats."""
        try:
            reply = await stub.Register(self._node, timeout=DEADLINE_S)
        except grpc.RpcError as failure:
            error = error_of(failure)
            if isinstance(error, StateError):
                raise error from None
            raise
        return float(reply.beat_interval_s) or 1.0

    async def _receive(self, call: Any) -> None:
        while (message := await self._heard(call)) is not grpc.aio.EOF:
            if not self.connected:
                self._set_connected(True)
            if message.HasField("assignment"):
                self._assigned(message.assignment)
            if message.HasField("ack"):
                self._acknowledge(message.ack.sequence)
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )
        raise UnreachableError("the master closed the stream")

    async def _heard(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(SILENCE_S):
                return await call.read()
        except TimeoutError:
            raise UnreachableError(f"the master has not been heard for {SILENCE_S:g} s") from None

    async def _send(self, call: Any, beat_interval_s: float) -> None:
        """Everything unacknowledged first, then what is new, and beats in between; ends with the call.

        One message at a time: the next one may become void while this one waits to be written."""
        loop = asyncio.get_running_loop()
        sent = 0
        beat_at = loop.time()
        while not call.done():
            self._news.clear()
            waiting = self._outbox.after(sent, 1)
            for message in waiting:
                await call.write(message)
                sent = message.sequence
            if loop.time() >= beat_at:
                await call.write(AgentMessage(beat=self._beat()))
                beat_at = loop.time() + beat_interval_s
            if not waiting:
                await self._news_within(beat_at - loop.time())

    async def _news_within(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._news.wait(), max(0.0, seconds))
        except TimeoutError:
            return

    def _beat(self) -> NodeBeat:
        return NodeBeat(
            sent_s=time.time(), memory_available_bytes=resources.memory_available_bytes(), speeds=self._speeds()
        )

    def _acknowledge(self, sequence: int) -> None:
        self._outbox.acknowledge(sequence)
        if not len(self._outbox):
            self._empty.set()
        self._measure()

    def _measure(self) -> None:
        metrics.OUTBOX_MESSAGES.set(len(self._outbox))
        metrics.OUTBOX_DROPPED.set(self._outbox.num_dropped)

    def _set_connected(self, connected: bool) -> None:
        if connected:
            self._failures = 0
            self._told = ""
            self._away.clear()
            _log.info("attends the master", address=self._address)
        else:
            self._away.set()
        self.connected = connected
        metrics.MASTER_CONNECTED.set(int(connected))

    def _lost(self, error: PsError) -> None:
        """Say once what it waits for, not at every try."""
        if self._told != error.code:
            self._told = error.code
            _log.warning("waits for the master", address=self._address, code=error.code, cause=error.cause)
