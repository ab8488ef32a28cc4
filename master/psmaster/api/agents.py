"""The Agents service: streams of agents to the core and back. Nothing is decided here."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import structlog

from pscluster.errors import CallerError, NotFoundError, VersionSkewError
from pscluster.rpc import PROTOCOL
from pscluster.rpc.access import CALLER, Caller, require_node
from pscluster.security.identity import Role
from pscluster.v1 import agents_pb2, agents_pb2_grpc
from psmaster.api import probe_proto, proto
from psmaster.control.agent_stream import AgentStream
from psmaster.control.loop import ControlLoop
from psmaster.control.transaction import Transaction
from psmaster.storage.bundles import BundleShelf
from psmaster.storage.logs import LogMessage

BEAT_INTERVAL_S = 1.0
_log = structlog.get_logger(__name__)
_PROCESS_ID = re.compile(r"([a-z0-9-]+)/((?:trainer|partition)-\d+)/(\d+)")


class AgentsService(agents_pb2_grpc.AgentsServicer):
    """Raises PsError from every method; the server's interceptor maps it."""

    def __init__(self, core: ControlLoop, shelf: BundleShelf) -> None:
        self._core = core
        self._shelf = shelf

    async def Register(self, request: agents_pb2.RegisterRequest, context: Any) -> agents_pb2.RegisterReply:
        if request.protocol != PROTOCOL:
            raise VersionSkewError(
                f"node {request.node_id} speaks protocol {request.protocol} (pscluster {request.version}), "
                f"this master {PROTOCOL}"
            )
        node = proto.node(request)
        require_node(CALLER.get(), node.node_id, Role(node.role))
        await self._core.ask(lambda tx: tx.register(node))
        suspicion_s = self._core.limits.suspicion_s
        return agents_pb2.RegisterReply(beat_interval_s=min(BEAT_INTERVAL_S, suspicion_s / 3), suspicion_s=suspicion_s)

    async def Attend(
        self, request_iterator: AsyncIterator[agents_pb2.AgentMessage], context: Any
    ) -> AsyncIterator[agents_pb2.MasterMessage]:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("hello"):
            raise CallerError("a stream begins with a hello")
        hello = first.hello
        require_node(CALLER.get(), hello.node_id)
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
        """Queue one message. One without meaning is acknowledged, since the agent would otherwise repeat it; so is one
        on a process that the node never had."""
        process_id = _process_of(message)
        if process_id and not (CALLER.get().local or self._core.was_assigned(stream.node_id, process_id)):
            _log.warning("a node reports on a process that it never had", node=stream.node_id, process=process_id[:200])
            message = agents_pb2.AgentMessage(sequence=message.sequence)
        log = _log_message(message) if message.HasField("log") else None
        if log is not None:
            await self._core.write_log(stream, message.sequence, *log)
            return
        if message.HasField("probe"):
            self._core.probe_orders.answered(probe_proto.answer(message.probe))
        await self._core.submit(stream, message.sequence, _change(stream, message))
        if message.HasField("beat"):
            stream.answer_beat()

    async def DownloadBundle(
        self, request: agents_pb2.DownloadBundleRequest, context: Any
    ) -> AsyncIterator[agents_pb2.BundleChunk]:
        self._require_use(CALLER.get(), request.sha256)
        chunks = self._shelf.chunks(request.sha256)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield agents_pb2.BundleChunk(data=chunk)

    def _require_use(self, caller: Caller, sha256: str) -> None:
        """Raises NotFoundError unless a process that needs the bundle is placed on the calling node, or it is the code
        of a job that the calling user may see."""
        jobs = [job for job in self._core.state.jobs.values() if job.bundle_sha256 == sha256]
        if caller.is_node:
            jobs = [job for job in jobs if any(placement.node_id == caller.name for placement in job.placements)]
        elif caller.is_user:
            jobs = [job for job in jobs if job.owner == caller.name]
        if not jobs and not caller.local:
            raise NotFoundError(f"{caller} has no job with bundle {sha256[:12]!r}")

    async def FindUnused(self, request: agents_pb2.FindUnusedRequest, context: Any) -> agents_pb2.FindUnusedReply:
        jobs = self._core.state.jobs
        used = {job.bundle_sha256 for job in jobs.values()}
        lasting = {job_id for job_id, job in jobs.items() if not job.state.ended}
        return agents_pb2.FindUnusedReply(
            bundles=[sha256 for sha256 in request.bundles if sha256 not in used],
            jobs=[job_id for job_id in request.jobs if job_id not in lasting],
        )


def _process_of(message: agents_pb2.AgentMessage) -> str:
    """Whom a message is about; empty: the node."""
    kind = message.WhichOneof("body")
    return str(getattr(message, kind).process_id) if kind in ("status", "event", "log") else ""


def _change(stream: AgentStream, message: agents_pb2.AgentMessage) -> Callable[[Transaction], None]:
    """What a message changes; one without meaning is a sign of life."""
    node, status, event = (stream.node_id, stream.incarnation), message.status, message.event
    exit_, report = proto.exit_of(status), proto.report(event.report)
    match message.WhichOneof("body"):
        case "status" if exit_ is not None:
            return lambda tx: tx.exited(stream.node_id, status.process_id, exit_)
        case "status":
            looks = proto.suspicion_of(status), proto.unreached_of(status)
            return lambda tx: tx.suspected(stream.node_id, status.process_id, *looks)
        case "event" if report is not None:
            return lambda tx: tx.reported(stream.node_id, event.process_id, report)
        case "goodbye":
            return lambda tx: tx.detach(*node, for_good=True)
        case "leaving":
            return lambda tx: tx.leaving(*node)
    speeds = proto.speeds(message.beat)
    return lambda tx: tx.beat(*node, speeds)


def _log_message(message: agents_pb2.AgentMessage) -> tuple[str, LogMessage] | None:
    """(job id, lines) of a log message; None when it names no process of ours."""
    match = _PROCESS_ID.fullmatch(message.log.process_id)
    if match is None:
        return None
    lines = tuple((line.time_s, line.stream, line.text) for line in message.log.lines)
    return match[1], LogMessage(
        source=match[2], attempt=int(match[3]), sequence=message.sequence, lines=lines, dropped=message.log.dropped
    )
