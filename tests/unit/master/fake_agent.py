"""An agent without processes: speaks the control protocol as the test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from pscluster import rpc
from pscluster.errors import PsError
from pscluster.v1 import agents_pb2, agents_pb2_grpc, plan_pb2, probe_pb2

DEADLINE_S = 20.0

Assignment = dict[str, plan_pb2.ProcessSpec]
"""By placement: "trainer-0"."""


class FakeAgent:
    """One node. `assignment` is the newest one; durable messages are numbered and kept until acknowledged."""

    def __init__(self, address: str, access: rpc.Access, node_id: str, life: str = "1", slots: int = 1) -> None:
        role = agents_pb2.Role.ROLE_WORKER if node_id.startswith("worker") else agents_pb2.Role.ROLE_SERVER
        self.node = agents_pb2.RegisterRequest(
            node_id=node_id,
            role=role,
            incarnation=f"{node_id}:{life}",
            resources=agents_pb2.Resources(cpu_cores=1, memory_bytes=1 << 30, slots=slots),
            version="0",
            protocol=rpc.PROTOCOL,
            hostname="here",
        )
        self.assignment: Assignment = {}
        self.revisions: list[int] = []
        self.deleted: list[str] = []
        self.acknowledged = 0
        self.kept: dict[int, agents_pb2.AgentMessage] = {}
        self.probes: list[probe_pb2.ProbeOrder] = []
        self.answers: Callable[[probe_pb2.ProbeOrder], probe_pb2.ProbeAnswer] | None = None
        """What it does on an order to measure; None: nothing, as an agent that does not know it."""
        self._sequence = 0
        self._address = address
        self._access = access
        self._changed = asyncio.Condition()
        self._channel: Any = None
        self._call: Any = None
        self._reading: asyncio.Task[None] | None = None

    async def open_stream(self, states: Iterable[agents_pb2.ProcessState] = ()) -> None:
        """Register, open the stream, and send again what was not acknowledged."""
        self._channel = rpc.open_aio_channel(self._address, self._access)
        stub: Any = agents_pb2_grpc.AgentsStub(self._channel)  # type: ignore[no-untyped-call]
        await stub.Register(self.node, timeout=DEADLINE_S)
        self._call = stub.Attend()
        hello = agents_pb2.Hello(node_id=self.node.node_id, incarnation=self.node.incarnation, processes=list(states))
        await self._call.write(agents_pb2.AgentMessage(hello=hello))
        for message in list(self.kept.values()):
            await self._call.write(message)
        self._reading = asyncio.create_task(self._read(self._call))

    async def ended(self) -> PsError:
        """Wait until the master ends the stream; why."""
        assert self._reading is not None
        await asyncio.gather(self._reading, return_exceptions=True)
        status = await self._call.code()
        return rpc.error_of(grpc.aio.AioRpcError(status, grpc.aio.Metadata(), await self._call.trailing_metadata()))

    async def leave(self) -> None:
        """Break the stream."""
        if self._reading is not None:
            self._call.cancel()
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            await self._channel.close()

    async def _read(self, call: Any) -> None:
        with contextlib.suppress(Exception):
            while True:
                message = await call.read()
                if not isinstance(message, agents_pb2.MasterMessage):
                    return
                await self._take(message)

    async def _take(self, message: agents_pb2.MasterMessage) -> None:
        if message.HasField("probe"):
            self.probes.append(message.probe)
            if self.answers is not None:
                await self._durable(probe=self.answers(message.probe))
        async with self._changed:
            if message.HasField("assignment"):
                self.revisions.append(message.assignment.revision)
                self.deleted = list(message.assignment.deleted_jobs)
                self.assignment = {spec.process_id.split("/")[1]: spec for spec in message.assignment.processes}
            if message.HasField("ack"):
                self.acknowledged = message.ack.sequence
                self.kept = {number: m for number, m in self.kept.items() if number > self.acknowledged}
            self._changed.notify_all()

    async def until(self, holds: Callable[[Assignment], bool]) -> Assignment:
        """Wait for an assignment; fails after 20 seconds."""
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(lambda: holds(self.assignment))
            return self.assignment

    async def flushed(self) -> None:
        """Wait until everything is acknowledged."""
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(lambda: not self.kept)

    async def beat(self) -> None:
        await self._call.write(agents_pb2.AgentMessage(beat=agents_pb2.NodeBeat(sent_s=1.0)))

    async def _durable(self, **body: Any) -> None:
        self._sequence += 1
        message = agents_pb2.AgentMessage(sequence=self._sequence, **body)
        self.kept[self._sequence] = message
        await self._call.write(message)

    async def report(self, process_id: str, **body: Any) -> None:
        """A process reports: trainer_ready=..., progress=..."""
        event = agents_pb2.ProcessEvent(process_id=process_id, report=plan_pb2.ProcessReport(**body))
        await self._durable(event=event)

    async def exited(self, process_id: str, **how: Any) -> None:
        phase = agents_pb2.ProcessStatus.PHASE_EXITED
        await self._durable(status=agents_pb2.ProcessStatus(process_id=process_id, phase=phase, **how))

    async def log(self, process_id: str, *texts: str) -> None:
        lines = [agents_pb2.LogLine(time_s=float(i), stream="stdout", text=text) for i, text in enumerate(texts)]
        await self._durable(log=agents_pb2.LogLines(process_id=process_id, lines=lines))

    async def ready(self, placement: str) -> None:
        """The process in a placement reports ready."""
        process_id = self.assignment[placement].process_id
        if placement.startswith("trainer"):
            await self.report(process_id, trainer_ready=TRAINER_READY)
        else:
            await self.report(process_id, partition_ready=PARTITION_READY)

    def states(self) -> list[agents_pb2.ProcessState]:
        """Everything in the assignment as running and ready."""
        return [
            agents_pb2.ProcessState(
                status=agents_pb2.ProcessStatus(
                    process_id=spec.process_id, phase=agents_pb2.ProcessStatus.PHASE_RUNNING
                ),
                ready=plan_pb2.ProcessReport(trainer_ready=TRAINER_READY)
                if placement.startswith("trainer")
                else plan_pb2.ProcessReport(partition_ready=PARTITION_READY),
            )
            for placement, spec in self.assignment.items()
        ]


TRAINER_READY = plan_pb2.TrainerReady(
    layout_json=b"{}", layout_sha256="L", data_fingerprint="D", numerics_class="N", final_step=30
)
PARTITION_READY = plan_pb2.PartitionReady(addresses=["unix:/x", "tcp:127.0.0.1:1"], numerics_class="O")
