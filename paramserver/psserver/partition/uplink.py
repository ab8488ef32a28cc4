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
        self._connection: Connection | None = None  # once welcomed
        self._closed = False
        self._dial()

    def close(self) -> None:
        """Hang up for good."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()

    def join(self) -> None:
        """Tell the lead which version is held, if it is; told again at each welcome."""
        if self._connection is not None and self._service.state is not None and self._service.state.is_filled:
            self._connection.send(self._service.header(kind=Kind.JOIN, step=self._service.member.step))

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
        if self._closed:
            connection.close()  # greeted in a timeline that has ended meanwhile
        elif header.kind is Kind.WELCOME:
            self._connection = connection
            self.join()
            self._service.hear_call()
        elif header.kind is Kind.VERDICT:
            self._service.hear_verdict(messages.unpack_verdict(body))
        elif header.kind is Kind.JOIN:
            self._service.hear_call()

    def closed(self, connection: Connection, error: PsError | None) -> None:
        if error is not None:
            self._service.counters.refused(error)
        if connection is self._connection:
            self._connection = None
        if not self._closed:
            self._reactor.call_later(_RETRY_S * random.uniform(0.5, 1.5), self._dial)

    def _dial(self) -> None:
        if self._closed:
            return
        try:
            address = choose_address(self._addresses, self._service.spec.network.transport)
        except FrameError:
            self._retry_later()
            return
        self._reactor.dial(address, self, self._dialled)

    def _dialled(self, connection: Connection | None, _reason: str) -> None:
        if connection is None:
            self._retry_later()
        elif self._closed:
            connection.close()
        else:
            connection.send(self._service.header(kind=Kind.HELLO), [json.dumps(self._greeting()).encode()])

    def _greeting(self) -> dict[str, object]:
        plan = self._service.plan
        assert plan is not None
        return {
            "token": plan.data_token.hex(),
            "role": "partition",
            "channel": "vote",
            "restore_generation": plan.restore_generation,
        }

    def _retry_later(self) -> None:
        self._reactor.call_later(_RETRY_S * random.uniform(0.5, 1.5), self._dial)
