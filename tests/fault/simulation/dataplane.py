"""What a partition or trainer sees of the world, on the simulated network and clock: connections, a reactor, its
agent's orders, the clock, and memory.

Frames travel over ordered streams, so reordering and repetition are faults of the network only for those kinds of
which the protocol promises to bear it: a node of the tree, a vote, a decision, a join.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pscluster.agent.link import BEAT_S
from pscluster.errors import PsError, UnreachableError
from pscluster.v1.plan_pb2 import Beat, Plan, ProcessOrder, ProcessReport, ProcessSpec, Shutdown
from pscluster.wire.frame import HEADER_BYTES, Buffer, FrameKind, Header
from pscluster.wire.reactor import DIAL_S, Dialed
from tests.fault.simulation.network import End, Network
from tests.fault.simulation.schedule import SOON_S, Life, Schedule
from tests.harness.frame_end import FrameEnd, joined

_BORNE = frozenset({FrameKind.PUSH, FrameKind.VOTE, FrameKind.DECISION, FrameKind.JOIN})


def bears_unruliness(message: Any) -> bool:
    """Whether the receiver of a message promises to bear it twice, or out of turn."""
    return isinstance(message, tuple) and message[0].kind in _BORNE


class Connection(FrameEnd):
    """One end of a connection between two simulated processes."""

    def __init__(self, end: End, handler: Any) -> None:
        super().__init__(handler)
        self._held: deque[tuple[Header, bytes] | None] = deque()  # while it does not read; None: the end
        self._end = end
        end.receive = self._receive
        end.lost = self._lost

    def send(
        self,
        header: Header,
        body: Sequence[Buffer] = (),
        *,
        tag: object = None,  # noqa: ARG002 - bodies are copied at once
        on_sent: Callable[[], None] | None = None,
        fds: Sequence[int] = (),
        body_checksum: int | None = None,  # noqa: ARG002 - nothing is corrupted on this network
    ) -> None:
        if not self.is_open:
            return
        assert not fds, "no descriptors travel between hosts"
        data = joined(body)
        what = _words(header) if self._end.network.schedule.reported is not None else ""
        self.sent_bytes += HEADER_BYTES + len(data)
        self._end.send((replace(header, length=len(data)), data), what)
        if on_sent is not None:
            on_sent()

    def close(self, error: PsError | None = None) -> None:
        if self.is_open:
            self.is_open = False
            self._end.close()
            self.handler.closed(self, error)

    def resume_reading(self) -> None:
        super().resume_reading()
        self._end.life.after(SOON_S, "", self._read_on)

    def _read_on(self) -> None:
        while self.reading and self.is_open and self._held:
            message = self._held.popleft()
            if message is None:
                self._hear_end()
            else:
                self._take(message)

    def _lost(self) -> None:
        if self.reading and not self._held:
            self._hear_end()
        else:
            self._held.append(None)

    def _hear_end(self) -> None:
        if self.is_open:
            self.is_open = False
            self.handler.closed(self, None)

    def _receive(self, message: tuple[Header, bytes]) -> None:
        if self.reading and not self._held:
            self._take(message)
        else:
            self._held.append(message)

    def _take(self, message: tuple[Header, bytes]) -> None:
        try:
            self.hand_over(*message)
        except PsError as error:
            self.close(error)


def _words(header: Header) -> str:
    where = f" of bucket {header.bucket} node {tuple(header.node)}" if header.kind is FrameKind.PUSH else ""
    return f"{header.kind.name}{where} at step {header.step}, generation {header.generation}, from {header.sender}"


class Reactor:
    """Stands in for the reactor of one process."""

    def __init__(self, network: Network, life: Life, host: str, stopped: Callable[[], None]) -> None:
        self._network = network
        self.life = life
        self._host = host
        self._stopped = stopped

    def post(self, call: Callable[[], None]) -> None:
        self.life.after(SOON_S, "", call)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.life.after(delay_s, "", call)

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Orders are read when they are there."""

    def stop(self) -> None:
        self._stopped()

    def close(self) -> None:
        """Connections end with the process."""

    def dial(self, address: str, handler: Any, done: Dialed, peer: str = "") -> None:  # noqa: ARG002 - no certificates
        """See Reactor.dial: it has an end, whatever the network does."""
        answered = False

        def dialled(end: End | None) -> None:
            nonlocal answered
            if answered:
                if end is not None:
                    end.close()
                return
            answered = True
            if end is None:
                done(None, UnreachableError("nobody listens"))
            else:
                done(Connection(end, handler), None)  # type: ignore[arg-type]

        self._network.dial(self.life, self._host, address, dialled)
        self.life.after(DIAL_S, "", lambda: None if answered else dialled(None))

    def listen(self, address: str, handler: Any) -> None:
        self._network.listen(address, self.life, self._host, lambda end: _accept(end, handler))


def _accept(end: End, handler: Any) -> None:
    Connection(end, handler)


class Link:
    """Stands in for `pscluster.agent.link.ProcessLink`: orders wait in it, reports go to the agent."""

    def __init__(self, life: Life, start: ProcessSpec, report: Callable[[ProcessReport], None]) -> None:
        self.life = life
        self.start = start
        self.report = report
        self._orders: deque[ProcessOrder] = deque()

    def fileno(self) -> int:
        return -1

    def receive_nowait(self) -> list[ProcessOrder]:
        orders, self._orders = list(self._orders), deque()
        return orders

    def order(self, plan: Plan | None) -> None:
        """Have an order read next: a plan, or to end."""
        self._orders.append(ProcessOrder(shutdown=Shutdown()) if plan is None else ProcessOrder(plan=plan))


class HeartbeatThread:
    """Stands in for `pscluster.agent.link.HeartbeatThread`: beats until the process ends, and not while it is
    stopped."""

    def __init__(self, link: Link, beat: Callable[[], Beat]) -> None:
        self._link = link
        self._beat = beat

    def start(self) -> None:
        self._link.report(ProcessReport(beat=self._beat()))
        self._link.life.after(BEAT_S, "", self.start)

    def close(self) -> None:
        """It ends with the process."""


class Clock:
    """Stands in for the `time` module. Nothing takes time but what the schedule says."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def time(self) -> float:
        return self._schedule.wall_s

    def perf_counter(self) -> float:
        return self._schedule.now_s

    monotonic = perf_counter


class Dice:
    """Stands in for the `random` module."""

    def __init__(self, source: random.Random) -> None:
        self.uniform = source.uniform
        self.random = source.random


class PrivateMemory:
    """Stands in for shared memory that nobody shares: between hosts there is none."""

    fd = -1

    def __init__(self, size_bytes: int) -> None:
        self.view = memoryview(bytearray(max(1, size_bytes)))

    @classmethod
    def create(cls, size_bytes: int, *, writable_by_others: bool) -> PrivateMemory:  # noqa: ARG003
        return cls(size_bytes)
