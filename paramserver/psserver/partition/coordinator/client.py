"""A partition's line to the coordinator: it joins, votes, and hears decisions."""

from __future__ import annotations

from typing import Protocol

from pscluster.errors import PsError
from pscluster.job.spec import JobSpec
from pscluster.wire.connection import Connection
from pscluster.wire.dialer import ReconnectingConnection
from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Join, Vote
from pscluster.wire.protocol import Channel, Hello
from pscluster.wire.reactor import Reactor
from psserver.partition.step.commit import Member
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters

_RETRY_S = (0.05, 0.05)  # the whole job waits for it


class Voter(Protocol):
    """What the uplink asks of its partition. Everything on the partition's thread."""

    spec: JobSpec
    state: PartitionState | None
    member: Member
    counters: PartitionCounters

    def header(self, **fields: object) -> Header:
        """A header of this job, generation and sender."""

    def make_hello(self, channel: Channel) -> tuple[Header, Hello]:
        """The HELLO to open a connection with."""

    def receive_vote_request(self) -> None:
        """The coordinator asks for the vote."""

    def receive_decision(self, decision: CommitDecision) -> None:
        """The coordinator's decision."""


class CoordinatorClient:
    """For one timeline; on the partition's thread."""

    def __init__(self, reactor: Reactor, service: Voter, addresses: list[str]) -> None:
        self._service = service
        kinds = frozenset({FrameKind.DECISION, FrameKind.JOIN})
        self._line = ReconnectingConnection(
            reactor, self, self._make_hello, channel="vote", kinds=kinds,
            transport=service.spec.network.transport, retry_s=_RETRY_S,
        )  # fmt: skip
        self._line.follow(addresses)

    def close(self) -> None:
        """Hang up for good."""
        self._line.close()

    def follow(self, addresses: list[str]) -> None:
        """The coordinator is at these addresses from now on; the one before, if it still lives, is not spoken to."""
        if addresses != self._line.addresses:
            self._line.follow(addresses)

    def unreached_s(self, now_s: float) -> float:
        """For how long the coordinator has not taken a connection, by the monotonic clock. From any thread."""
        return self._line.unreached_s(now_s)

    def join(self) -> None:
        """Tell the coordinator which version is held, if it is, and the decision that made it; told again at each
        welcome."""
        connection, state, member = self._line.connection, self._service.state, self._service.member
        if connection is not None and state is not None and state.is_filled:
            body = Join(member.last_decision).pack()
            connection.send(self._service.header(kind=FrameKind.JOIN, step=member.step), [body])

    def vote(self, vote: Vote) -> None:
        """Send a vote; it is sent again at each welcome."""
        if self._line.connection is not None:
            header = self._service.header(kind=FrameKind.VOTE, step=vote.step)
            self._line.connection.send(header, [vote.pack()])

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - it says nothing that is needed
        self.join()
        self._service.receive_vote_request()

    def frame(self, header: Header, body: memoryview) -> None:
        if header.kind is FrameKind.DECISION:
            self._service.receive_decision(CommitDecision.unpack(body))
        elif header.kind is FrameKind.JOIN:
            self._service.receive_vote_request()

    def lost(self, error: PsError | None) -> None:
        """What was sent is sent again at the next welcome."""
        if error is not None:
            self._service.counters.refused(error)

    def _make_hello(self, _connection: Connection) -> tuple[Header, Hello]:
        return self._service.make_hello("vote")
