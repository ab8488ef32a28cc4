"""A partition's connection to the coordinator: joins and votes go out, decisions and requests for votes come in."""

from __future__ import annotations

from collections.abc import Callable

from pscluster.errors import PsError
from pscluster.wire.connection import Connection
from pscluster.wire.dialer import ReconnectingConnection
from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Join, Vote
from pscluster.wire.protocol import Hello
from pscluster.wire.reactor import Reactor
from psserver.partition.actions import Action
from psserver.partition.partition import Partition

_RETRY_S = (0.05, 0.05)  # the whole job waits for it


class CoordinatorClient:
    """For one restore generation; on the partition's thread."""

    def __init__(
        self, reactor: Reactor, partition: Partition, addresses: list[str], carry_out: Callable[[list[Action]], None]
    ) -> None:
        self._partition = partition
        self._carry_out = carry_out
        kinds = frozenset({FrameKind.DECISION, FrameKind.JOIN})
        self._dialer = ReconnectingConnection(
            reactor, self, self._make_hello, channel="vote", kinds=kinds,
            transport=partition.spec.network.transport, retry_s=_RETRY_S,
        )  # fmt: skip
        self._dialer.follow(addresses)

    def close(self) -> None:
        """Close the connection for good."""
        self._dialer.close()

    def follow(self, addresses: list[str]) -> None:
        """The coordinator is at these addresses from now on; the connection to another one is closed."""
        if addresses != self._dialer.addresses:
            self._dialer.follow(addresses)

    def unreached_s(self, now_s: float) -> float:
        """For how long the coordinator has not taken a connection, by the monotonic clock. From any thread."""
        return self._dialer.unreached_s(now_s)

    def join(self) -> None:
        """Send the version that is held, if it is whole, and the decision that made it; repeated at each welcome."""
        connection, state, member = self._dialer.connection, self._partition.state, self._partition.member
        if connection is not None and state is not None and state.is_filled:
            header = self._partition.header(kind=FrameKind.JOIN, step=member.step)
            connection.send(header, [Join(member.last_decision).pack()])

    def vote(self, vote: Vote) -> None:
        """Send a vote; it is repeated at each welcome."""
        if self._dialer.connection is not None:
            header = self._partition.header(kind=FrameKind.VOTE, step=vote.step)
            self._dialer.connection.send(header, [vote.pack()])

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - nothing in it is needed
        self.join()
        self._carry_out(self._partition.machine.vote_again())

    def frame(self, header: Header, body: memoryview) -> None:
        machine = self._partition.machine
        if header.kind is FrameKind.DECISION:
            self._carry_out(machine.receive_decision(CommitDecision.unpack(body)))
        elif header.kind is FrameKind.JOIN:
            self._carry_out(machine.vote_again())

    def lost(self, error: PsError | None) -> None:
        """What was sent is sent again at the next welcome."""
        if error is not None:
            self._partition.counters.refused(error)

    def _make_hello(self, _connection: Connection) -> tuple[Header, Hello]:
        return self._partition.make_hello("vote")
