"""The Agents service: streams of agents to the core and back. Nothing is decided here."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

from pscluster.errors import CallerError, VersionSkewError
from pscluster.rpc import PROTOCOL
from pscluster.v1 import agents_pb2, agents_pb2_grpc
from psmaster.api import proto
from psmaster.control.agent_stream import AgentStream
from psmaster.control.loop import Core
from psmaster.control.transaction import Report
from psmaster.model.process import Exit
from psmaster.storage.bundles import BundleShelf
from psmaster.storage.logs import LogMessage

BEAT_INTERVAL_S = 1.0
_PROCESS_ID = re.compile(r"([a-z0-9-]+)/((?:trainer|partition)-\d+)/(\d+)")


class AgentsService(agents_pb2_grpc.AgentsServicer):
    """Raises PsError from every method; the server's interceptor maps it."""

    def __init__(self, core: Core, shelf: BundleShelf) -> None:
        self._core = core
        self._shelf = shelf

    async def Register(self, request: agents_pb2.RegisterRequest, context: Any) -> agents_pb2.RegisterReply:  # noqa: ARG002, N802
        if request.protocol != PROTOCOL:
            raise VersionSkewError(
                f"node {request.node_id} speaks protocol {request.protocol} (pscluster {request.version}), "
                f"this master {PROTOCOL}"
            )
        node = proto.node(request)
        await self._core.ask(lambda tx: tx.register(node))
        suspicion_s = self._core.limits.suspicion_s
        return agents_pb2.RegisterReply(beat_interval_s=min(BEAT_INTERVAL_S, suspicion_s / 3), suspicion_s=suspicion_s)

    async def Attend(  # noqa: N802
        self,
        request_iterator: AsyncIterator[agents_pb2.AgentMessage],
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[agents_pb2.MasterMessage]:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("hello"):
            raise CallerError("a stream begins with a hello")
        hello = first.hello
        processes = proto.processes(hello.node_id, hello.processes)
        stream = await self._core.open_stream(hello.node_id, hello.incarnation, processes)
        reading = asyncio.create_task(self._read(stream, request_iterator))
        try:
            async for message in stream.messages():
                yield proto.master_message(message)
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            self._core.close_stream(stream)

    async def _read(self, stream: AgentStream, messages: AsyncIterator[agents_pb2.AgentMessage]) -> None:
        try:
            async for message in messages:
                if stream.closed:
                    return
                await self._submit(stream, message)
        finally:
            stream.close()

    async def _submit(self, stream: AgentStream, message: agents_pb2.AgentMessage) -> None:
        """Queue one message. One without meaning is acknowledged, since the agent would otherwise repeat it."""
        core, node_id, sequence = self._core, stream.node_id, message.sequence
        body = message.WhichOneof("body")
        if body == "log" and (log := _log_message(message)) is not None:
            await core.write_log(stream, sequence, *log)
            return
        status, report = message.status, proto.report(message.event.report)
        exit_ = proto.exit_of(status) if body == "status" else None
        if exit_ is not None:
            await self._submit_exit(stream, sequence, status.process_id, exit_)
        elif body == "status":
            looks = proto.suspicion_of(status), proto.unreached_of(status)
            await core.submit(stream, sequence, lambda tx: tx.suspected(node_id, status.process_id, *looks))
        elif body == "event" and report is not None:
            await self._submit_report(stream, sequence, message.event.process_id, report)
        elif body == "goodbye":
            await core.submit(stream, sequence, lambda tx: tx.detach(node_id, stream.incarnation, for_good=True))
        elif body == "leaving":
            await core.submit(stream, sequence, lambda tx: tx.leaving(node_id, stream.incarnation))
        else:
            speeds = proto.speeds(message.beat)
            await core.submit(stream, sequence, lambda tx: tx.beat(node_id, stream.incarnation, speeds))
            stream.answer_beat()

    async def _submit_exit(self, stream: AgentStream, sequence: int, process_id: str, exit_: Exit) -> None:
        await self._core.submit(stream, sequence, lambda tx: tx.exited(stream.node_id, process_id, exit_))

    async def _submit_report(self, stream: AgentStream, sequence: int, process_id: str, report: Report) -> None:
        await self._core.submit(stream, sequence, lambda tx: tx.reported(stream.node_id, process_id, report))

    async def DownloadBundle(  # noqa: N802
        self,
        request: agents_pb2.DownloadBundleRequest,
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[agents_pb2.BundleChunk]:
        chunks = self._shelf.chunks(request.sha256)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield agents_pb2.BundleChunk(data=chunk)


def _log_message(message: agents_pb2.AgentMessage) -> tuple[str, LogMessage] | None:
    """(job id, lines) of a log message; None when it names no process of ours."""
    match = _PROCESS_ID.fullmatch(message.log.process_id)
    if match is None:
        return None
    lines = tuple((line.time_s, line.stream, line.text) for line in message.log.lines)
    return match[1], LogMessage(
        source=match[2], attempt=int(match[3]), sequence=message.sequence, lines=lines, dropped=message.log.dropped
    )
