"""A partition's connection to the lead: joins, votes, hears verdicts; dials again until it is closed."""

from __future__ import annotations

import json
import random
from typing import Protocol

from pscluster.errors import FrameError, PsError
from pscluster.spec import JobSpec
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.connection import Connection
from pscluster.wire.frame import MAX_SMALL_BYTES, Header, Kind
from pscluster.wire.reactor import Reactor
from pscluster.wire.transport import choose_address
from psserver.partition import messages
from psserver.partition.commit import Member, Verdict, Vote
from psserver.partition.state import PartitionState
from psserver.partition.telemetry import PartitionCounters

_RETRY_S = 0.05


class Voter(Protocol):
    """What the uplink asks of its partition. Everything on the partition's thread."""

    spec: JobSpec
    plan: Plan | None
    state: PartitionState | None
    member: Member
    counters: PartitionCounters

    @property
    def attempt(self) -> int:
        """Which process of its seat the partition is."""

    def header(self, **fields: object) -> Header:
        """A header of this job, generation and sender."""

    def hear_call(self) -> None:
        """The lead asks for the vote."""

    def hear_verdict(self, verdict: Verdict) -> None:
        """The lead's verdict."""


class Uplink:
    """For one timeline; on the partition's thread."""

    def __init__(self, reactor: Reactor, service: Voter, addresses: list[str]) -> None:
        self._reactor = reactor
        self._service = service
        self._addresses = addresses
        self._greeted: Connection | None = None  # the HELLO is on its way
        self._connection: Connection | None = None  # once welcomed
        self._closed = False
        self._dials = 0  # the newest one counts
        self._dial()

    def close(self) -> None:
        """Hang up for good."""
        self._closed = True
        self._hang_up()

    def follow(self, addresses: list[str]) -> None:
        """The lead is at these addresses from now on; the one before, if it still lives, is not spoken to."""
        if addresses != self._addresses:
            self._addresses = addresses
            self._hang_up()
            self._dial()

    def _hang_up(self) -> None:
        connections, self._greeted, self._connection = (self._greeted, self._connection), None, None
        self._dials += 1
        for connection in connections:
            if connection is not None:
                connection.close()

    def join(self) -> None:
        """Tell the lead which version is held, if it is, and the verdict that made it; told again at each welcome."""
        if self._connection is not None and self._service.state is not None and self._service.state.is_filled:
            member = self._service.member
            body = messages.pack_verdict(member.last_verdict) if member.last_verdict is not None else b""
            self._connection.send(self._service.header(kind=Kind.JOIN, step=member.step), [body])

    def vote(self, vote: Vote) -> None:
        """Send a vote; it is sent again at each welcome."""
        if self._connection is not None:
            header = self._service.header(kind=Kind.VOTE, step=vote.step)
            self._connection.send(header, [messages.pack_vote(vote)])

    def body_target(self, connection: Connection, header: Header) -> memoryview:  # noqa: ARG002 - Handler's signature
        if header.kind not in (Kind.WELCOME, Kind.VERDICT, Kind.JOIN, Kind.FENCED) or header.length > MAX_SMALL_BYTES:
            raise FrameError(f"{header.kind.name} of {header.length} bytes from the lead")
        return memoryview(bytearray(header.length))

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        if connection is not self._greeted and connection is not self._connection:
            connection.close()  # greeted under a plan that has ended meanwhile
        elif header.kind is Kind.WELCOME:
            self._greeted, self._connection = None, connection
            self.join()
            self._service.hear_call()
        elif header.kind is Kind.VERDICT:
            self._service.hear_verdict(messages.unpack_verdict(body))
        elif header.kind is Kind.JOIN:
            self._service.hear_call()

    def closed(self, connection: Connection, error: PsError | None) -> None:
        if error is not None:
            self._service.counters.refused(error)
        if connection is self._greeted or connection is self._connection:
            self._greeted = self._connection = None
            self._retry_later()

    def _dial(self) -> None:
        self._dials += 1
        number = self._dials
        try:
            address = choose_address(self._addresses, self._service.spec.network.transport)
        except FrameError:
            self._retry_later()
            return
        self._reactor.dial(address, self, lambda connection, _: self._dialled(number, connection))

    def _dialled(self, number: int, connection: Connection | None) -> None:
        if self._closed or number != self._dials:
            if connection is not None:
                connection.close()
        elif connection is None:
            self._retry_later()
        else:
            self._greeted = connection
            connection.send(self._service.header(kind=Kind.HELLO), [json.dumps(self._greeting()).encode()])

    def _greeting(self) -> dict[str, object]:
        plan = self._service.plan
        assert plan is not None
        return {
            "token": plan.data_token.hex(),
            "role": "partition",
            "channel": "vote",
            "attempt": self._service.attempt,
            "restore_generation": plan.restore_generation,
        }

    def _retry_later(self) -> None:
        number = self._dials
        delay_s = _RETRY_S * random.uniform(0.5, 1.5)
        self._reactor.call_later(delay_s, lambda: self._dial() if number == self._dials and not self._closed else None)
