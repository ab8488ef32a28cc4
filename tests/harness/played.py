"""The data plane without sockets or clocks: real partitions and real peers, on a network that a test drives by hand.

Nothing happens by itself: frames wait in queues until `Network.step` or `Network.settle` delivers them.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psserver.partition.process
from harness.frame_end import FrameEnd, joined
from pscluster.errors import FrameError, PsError, UnreachableError
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.layout import Layout
from pscluster.v1.plan_pb2 import PartitionPlacement, Plan, ProcessReport, ProcessSpec, ShardRange, TrainerPlacement
from pscluster.wire.frame import IN_MEMORY, Buffer, FrameKind, Header, checksum, job_number, pack, unpack
from pscluster.wire.reactor import Dialed
from psserver.partition.actions import JoinJob
from psserver.partition.process import PartitionService
from psserver.partition.telemetry import PartitionCounters

psserver.partition.process.SLICE_S = 0.0  # updates take turns with frames after each bucket, not when a clock says so

JOB = "job-played"
TOKEN = b"0123456789abcdef"
NOWHERE = Path("/nonexistent")


class _Passed:
    """Descriptors on their way with a frame; closed with it if nobody takes them."""

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = [os.dup(fd) for fd in fds]

    def take(self) -> list[int]:
        fds, self.fds = self.fds, []
        return fds

    def __del__(self) -> None:
        for fd in self.fds:
            os.close(fd)


class PlayedConnection(FrameEnd):
    """One end of a connection on the played network.

    A local one passes descriptors to the end that dialled, as a Unix socket does. `takes`: so many frames more, and
    `send` finds it broken at the next; None: it does not break by itself."""

    def __init__(self, network: Network, handler: Any, *, is_local: bool, takes_fds: bool) -> None:
        super().__init__(handler, is_local=is_local)
        self.network = network
        self.takes: int | None = None
        self.inbox: deque[tuple[Header, bytes, _Passed]] = deque()
        self.other: PlayedConnection | None = None
        self.error: PsError | None = None
        self._takes_fds = is_local and takes_fds
        self._passed = _Passed(())

    def send(
        self,
        header: Header,
        body: Sequence[Buffer] = (),
        *,
        tag: object = None,  # noqa: ARG002 - bodies are copied at once
        on_sent: Callable[[], None] | None = None,
        fds: Sequence[int] = (),
        body_checksum: int | None = None,
    ) -> None:
        if not self.is_open or self.other is None:
            return
        if self.takes == 0:
            self._break()
            return
        self.takes = None if self.takes is None else self.takes - 1
        assert self.is_local or not fds, "descriptors do not travel over TCP"
        data = joined(body)
        assert body_checksum in (None, checksum([data])), "what the sender knows of its body is not so"
        header = unpack(pack(replace(header, length=len(data), checksum=checksum([data]) if data else 0)))
        if header.kind in (FrameKind.PUSH, FrameKind.VALUES) and header.flags & IN_MEMORY:
            self.network.in_memory[header.kind] += 1
        self.sent_bytes += len(data)
        self.other.inbox.append((header, data, _Passed(fds if self.other._takes_fds else ())))
        if on_sent is not None:
            on_sent()

    def _break(self) -> None:
        """As a real one does it: this end's handler hears of it within `send`, the other's when it comes to it."""
        self.network.breaks += 1
        other, self.other = self.other, None
        if other is not None:
            self.network.post(other.close)
        self.close(FrameError("a data connection broke while sending: reset"))

    def take_fds(self) -> list[int]:
        return self._passed.take()

    def deliver(self) -> None:
        """Hand the oldest waiting frame to the handler."""
        header, data, self._passed = self.inbox.popleft()
        try:
            self.hand_over(header, data)
        except PsError as error:
            self.network.refused.append(error)
            self.close(error)
        self._passed = _Passed(())  # nobody wanted them

    def close(self, error: PsError | None = None) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self.error = error
        self.inbox.clear()
        self.network.connections.remove(self)
        self.handler.closed(self, error)
        if self.other is not None:
            self.other.close(None)


class Network:
    """Stands in for the reactor of every process in the test; also holds every open connection.

    `refused`: why a handler closed a connection, for all of them. `in_memory`: frames sent whose body lies in shared
    memory, by kind. `breaks`: how often a connection was found broken by who sent."""

    def __init__(self) -> None:
        self.refused: list[PsError] = []
        self.in_memory: Counter[FrameKind] = Counter()
        self.breaks = 0
        self.posted: deque[Callable[[], None]] = deque()
        self.timers: deque[Callable[[], None]] = deque()
        self.connections: list[PlayedConnection] = []
        self.listeners: dict[str, Any] = {}

    def post(self, call: Callable[[], None]) -> None:
        self.posted.append(call)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:  # noqa: ARG002 - the test says when
        self.timers.append(call)

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Orders are given by calling `adopt`."""

    def stop(self) -> None:
        """Nothing runs by itself."""

    def connect(self, ours: Any, theirs: Any, *, local: bool = False) -> tuple[PlayedConnection, PlayedConnection]:
        """A connection between two handlers, of which ours dials; `local`: both are on one host for sure."""
        near = PlayedConnection(self, ours, is_local=local, takes_fds=True)
        far = PlayedConnection(self, theirs, is_local=local, takes_fds=False)
        near.other, far.other = far, near
        self.connections += (near, far)
        return near, far

    def dial(self, address: str, handler: Any, done: Dialed, peer: str = "") -> None:  # noqa: ARG002 - no certificates
        kind, _, name = address.partition(":")

        def dialled() -> None:
            if name not in self.listeners:
                done(None, UnreachableError("nobody listens"))
            else:
                done(self.connect(handler, self.listeners[name], local=kind == "unix")[0], None)  # type: ignore[arg-type]

        self.post(dialled)

    def break_soon(self, choice: int) -> None:
        """Some connection takes a few more frames from one of its ends, and then breaks within `send`."""
        if self.connections:
            after, which = divmod(choice, len(self.connections))
            self.connections[which].takes = after % 8

    def choices(self) -> list[Callable[[], None]]:
        """Everything that could happen next."""
        found: list[Callable[[], None]] = [c.deliver for c in self.connections if c.inbox and c.reading]
        if self.posted:
            found.append(lambda: self.posted.popleft()())
        return found

    def go_on(self, number: int) -> None:
        """Let so many things happen, each chosen by `number` among those that could."""
        for turn in range(number):
            if choices := self.choices():
                choices[(number + turn) % len(choices)]()

    def fire_timers(self) -> None:
        """Run what `call_later` was asked for until now, once."""
        due, self.timers = self.timers, deque()
        for call in due:
            call()

    def settle(self, *, redial: bool = True, limit: int = 100_000) -> None:
        """Deliver and run until nothing is left; due redials are made, too."""
        for _ in range(limit):
            choices = self.choices()
            if choices:
                choices[0]()
            elif redial and self.timers:
                self.fire_timers()
                redial = False
            else:
                return
        raise AssertionError("the network never comes to rest")


class PlayedLink:
    """Stands in for a process's line to its agent; keeps what is reported."""

    def __init__(self, start: ProcessSpec) -> None:
        self.start = start
        self.reports: list[ProcessReport] = []

    def fileno(self) -> int:
        return -1

    def report(self, report: ProcessReport) -> None:
        self.reports.append(report)

    def reported(self, body: str) -> list[Any]:
        return [getattr(report, body) for report in self.reports if report.WhichOneof("body") == body]


class KeptParts:
    """Stands in for the snapshot writer: remembers the steps that it was asked to write."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, meta: Any, layout: Layout, pieces: object, done: object, *, last: bool = False) -> None:  # noqa: ARG002
        self.steps.append(meta.step)

    def retain(self, kept: object) -> None:
        """Nothing is on disk."""

    def close(self) -> None:
        """Nothing runs."""


def played_spec(num_shards: int, partitions: int = 1, **sections: Any) -> JobSpec:
    """A job of `num_shards` shards of one sample each."""
    train = {"global_batch": num_shards, "microbatch": 1, "max_steps": 100, **sections.pop("train", {})}
    servers = {"partitions": partitions}
    return parse_spec({"name": "played", "task": {"entrypoint": "a:B"}, "train": train, "servers": servers, **sections})


def played_plan(
    layout: Layout, shards: Mapping[int, Sequence[int]], *, generation: int = 1, partitions: int = 1, **fields: Any
) -> Plan:
    """A plan that gives each rank the shards named."""
    trainers = [
        TrainerPlacement(rank=rank, active=True, shards=[ShardRange(first=shard, count=1) for shard in mine])
        for rank, mine in sorted(shards.items())
    ]
    both = [[f"unix:partition:{i}", f"tcp:partition:{i}"] for i in range(partitions)]
    placements = [PartitionPlacement(index=i, addresses=addresses) for i, addresses in enumerate(both)]
    return Plan(
        job_id=JOB, generation=generation, trainers=trainers, partitions=placements, layout_json=layout.to_json(),
        data_token=TOKEN, final_step=fields.pop("final_step", 100),
        restore_generation=fields.pop("restore_generation", 1), **fields,
    )  # fmt: skip


def played_partition(
    network: Network, spec: JobSpec, index: int = 0, store: Path = NOWHERE, *, attempt: int = 0
) -> PartitionService:
    """A real partition on the played network; it listens over both transports, has no plan yet, writes no snapshot.

    With an attempt it has an address of its own, which names it."""
    link = PlayedLink(ProcessSpec(job_id=JOB, rank=index, store=str(store), attempt=attempt))
    service = PartitionService(link, spec, network, PartitionCounters())  # type: ignore[arg-type]
    service.saving.close()
    service.saving.writer = KeptParts()  # type: ignore[assignment]
    network.listeners[f"partition:{index}" + (f":{attempt}" if attempt else "")] = service.handler
    return service


def dismiss(service: PartitionService) -> None:
    """End a played partition: its connections close, and its shared memory goes without waiting for the collector."""
    service.clients.close_all()
    if service._coordinator_client is not None:
        service._coordinator_client.line.close()
    service.replication.close()
    if service.state is not None:
        for tensors in (service.state.published, service.state.values):
            tensors.clear()
        del service.state.segment
    service.state = service.machine.step = None


def fill(service: PartitionService) -> None:
    """Give a partition its first values: what its memory holds."""
    assert service.state is not None
    for span in service.state.spans:
        if service.state.fill(span.bucket):
            service.carry_out([JoinJob()])


def started(network: Network, layout: Layout, num_shards: int = 1, /, **sections: Any) -> PartitionService:
    """The only partition of a job with one trainer, in generation 1; not yet filled."""
    service = played_partition(network, played_spec(num_shards, **sections))
    service.adopt(played_plan(layout, {0: list(range(num_shards))}))
    return service


def filled(network: Network, layout: Layout, num_shards: int = 1, /, **sections: Any) -> PartitionService:
    """The same, with zeros."""
    service = started(network, layout, num_shards, **sections)
    fill(service)
    return service


def job_header(kind: FrameKind, **fields: Any) -> Header:
    """A header of the played job."""
    return Header(kind=kind, **{"job": job_number(JOB), **fields})
