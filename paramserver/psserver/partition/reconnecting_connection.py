"""A partition's line to another process of its job: it dials whom the plan names, greets, and dials again."""

from __future__ import annotations

import json
import random
import time
from typing import Protocol

from pscluster.errors import FrameError, PsError
from pscluster.job.spec import JobSpec
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.connection import Connection
from pscluster.wire.frame import MAX_SMALL_BYTES, FrameKind, Header
from pscluster.wire.reactor import Reactor
from pscluster.wire.transport import choose_address
from psserver.partition.telemetry import PartitionCounters


class Caller(Protocol):
    """The partition that calls. Everything on its thread."""

    spec: JobSpec
    plan: Plan | None
    counters: PartitionCounters

    @property
    def attempt(self) -> int:
        """Which process of its placement it is."""

    def header(self, **fields: object) -> Header:
        """A header of this job, generation and sender."""


class Listener(Protocol):
    """Who talks over the line."""

    def welcomed(self, header: Header, body: memoryview) -> None:
        """The other end is there, and knows who calls: `ReconnectingConnection.connection` is set."""

    def heard(self, header: Header, body: memoryview) -> None:
        """A frame after the welcome."""

    def lost(self) -> None:
        """The connection is gone, or its greeting was in vain; it is dialled again. Maybe within a send over it."""


class ReconnectingConnection:
    """`connection`: once welcomed. `kinds`: what may come, all of it small. `retry_s`: between two dials at first, and
    at most; half as long again each time."""

    def __init__(
        self,
        reactor: Reactor,
        caller: Caller,
        listener: Listener,
        *,
        channel: str,
        kinds: frozenset[FrameKind],
        retry_s: tuple[float, float],
    ) -> None:
        self.connection: Connection | None = None
        self._reactor = reactor
        self._caller = caller
        self._listener = listener
        self._channel = channel
        self._kinds = kinds | {FrameKind.WELCOME, FrameKind.FENCED}
        self._retry_s = retry_s
        self._addresses: list[str] = []
        self._greeted: Connection | None = None  # its HELLO is on its way
        self._dials = 0  # the newest one counts
        self._failures = 0
        self._unreached_since_s: float | None = None  # monotonic; None: there is a connection, or none is wanted

    @property
    def addresses(self) -> list[str]:
        """Of whom it talks to; none: nobody."""
        return self._addresses

    def follow(self, addresses: list[str]) -> None:
        """Talk to who is at these addresses from now on. Who was talked to before, if it still lives, is not heard."""
        self._addresses = addresses
        self._failures = 0
        self._dials += 1
        connections, self._greeted, self.connection = (self._greeted, self.connection), None, None
        for connection in connections:
            if connection is not None:
                connection.close()
        self._unreached_since_s = time.monotonic() if addresses else None
        if addresses:
            self._dial()

    def unreached_s(self, now_s: float) -> float:
        """For how long nothing at the addresses has taken a connection, by the monotonic clock. From any thread."""
        since_s = self._unreached_since_s
        return 0.0 if since_s is None else now_s - since_s

    def close(self) -> None:
        """Hang up; only `follow` dials again."""
        self.follow([])

    def _dial(self) -> None:
        self._dials += 1
        number = self._dials
        try:
            address = choose_address(self._addresses, self._caller.spec.network.transport)
        except FrameError:
            self._retry(number)
            return
        self._reactor.dial(address, self, lambda connection, _: self._dialled(number, connection))

    def _dialled(self, number: int, connection: Connection | None) -> None:
        if number != self._dials:
            if connection is not None:
                connection.close()
        elif connection is None:
            self._retry(number)
        else:
            self._greeted = connection
            self._unreached_since_s = None
            connection.send(self._caller.header(kind=FrameKind.HELLO), [json.dumps(self._greeting()).encode()])

    def _greeting(self) -> dict[str, object]:
        plan = self._caller.plan
        assert plan is not None
        return {
            "token": plan.data_token.hex(),
            "role": "partition",
            "channel": self._channel,
            "attempt": self._caller.attempt,
            "restore_generation": plan.restore_generation,
        }

    def _retry(self, number: int) -> None:
        low, high = self._retry_s
        delay_s = min(high, low * 1.5 ** min(self._failures, 20)) * random.uniform(0.5, 1.5)
        self._failures += 1
        self._reactor.call_later(delay_s, lambda: self._dial() if number == self._dials else None)

    # ---- the connection's handler ----

    def body_target(self, connection: Connection, header: Header) -> memoryview:  # noqa: ARG002 - Handler's signature
        if header.kind not in self._kinds or header.length > MAX_SMALL_BYTES:
            raise FrameError(f"{header.kind.name} of {header.length} bytes on a {self._channel} connection")
        return memoryview(bytearray(header.length))

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        if connection is not self._greeted and connection is not self.connection:
            connection.close()  # of a plan that has ended meanwhile
        elif header.kind is FrameKind.WELCOME:
            self._greeted, self.connection, self._failures = None, connection, 0
            self._listener.welcomed(header, body)
        else:
            self._listener.heard(header, body)

    def closed(self, connection: Connection, error: PsError | None) -> None:
        if error is not None:
            self._caller.counters.refused(error)
        if connection is self.connection or connection is self._greeted:
            self._greeted = self.connection = None
            self._unreached_since_s = time.monotonic()
            self._retry(self._dials)
            self._listener.lost()
