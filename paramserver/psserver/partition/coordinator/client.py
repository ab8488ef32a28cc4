"""A partition's connection to the coordinator: joins and votes go out, decisions and requests for votes come in."""

from __future__ import annotations

from collections.abc import Callable

from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.reactor import Reactor
from psserver.partition import messages
from psserver.partition.actions import Action
from psserver.partition.partition import Partition
from psserver.partition.reconnecting_connection import ReconnectingConnection
from psserver.partition.step.commit import Vote

_RETRY_S = (0.05, 0.05)  # the whole job waits for it


class CoordinatorClient:
    """For one restore generation; on the partition's thread."""

    def __init__(
        self, reactor: Reactor, partition: Partition, addresses: list[str], carry_out: Callable[[list[Action]], None]
    ) -> None:
        self._partition = partition
        self._carry_out = carry_out
        kinds = frozenset({FrameKind.DECISION, FrameKind.JOIN})
        self._line = ReconnectingConnection(reactor, partition, self, channel="vote", kinds=kinds, retry_s=_RETRY_S)
        self._line.follow(addresses)

    def close(self) -> None:
        """Close the connection for good."""
        self._line.close()

    def follow(self, addresses: list[str]) -> None:
        """The coordinator is at these addresses from now on; the connection to another one is closed."""
        if addresses != self._line.addresses:
            self._line.follow(addresses)

    def unreached_s(self, now_s: float) -> float:
        """For how long the coordinator has not taken a connection, by the monotonic clock. From any thread."""
        return self._line.unreached_s(now_s)

    def join(self) -> None:
        """Send the version that is held, if it is whole, and the decision that made it; repeated at each welcome."""
        connection, state, member = self._line.connection, self._partition.state, self._partition.member
        if connection is not None and state is not None and state.is_filled:
            body = messages.pack_decision(member.last_decision) if member.last_decision is not None else b""
            connection.send(self._partition.header(kind=FrameKind.JOIN, step=member.step), [body])

    def vote(self, vote: Vote) -> None:
        """Send a vote; it is repeated at each welcome."""
        if self._line.connection is not None:
            header = self._partition.header(kind=FrameKind.VOTE, step=vote.step)
            self._line.connection.send(header, [messages.pack_vote(vote)])

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - nothing in it is needed
        self.join()
        self._carry_out(self._partition.machine.vote_again())

    def heard(self, header: Header, body: memoryview) -> None:
        machine = self._partition.machine
        if header.kind is FrameKind.DECISION:
            self._carry_out(machine.receive_decision(messages.unpack_decision(body)))
        elif header.kind is FrameKind.JOIN:
            self._carry_out(machine.vote_again())

    def lost(self) -> None:
        """Nothing to undo: what was sent is sent again at the next welcome."""
