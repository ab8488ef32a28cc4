"""A partition's connection to the coordinator: joins and votes go out, decisions and requests for votes come in."""

from __future__ import annotations

from collections.abc import Callable

from pscluster.errors import PsError
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.dialer import ReconnectingConnection
from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Join, Vote
from pscluster.wire.reactor import Reactor
from psserver.partition.actions import Action
from psserver.partition.partition import Partition

_RETRY_S = (0.05, 0.05)  # the whole job waits for it


class CoordinatorClient:
    """For one restore generation; on the partition's thread."""

    def __init__(
        self, reactor: Reactor, partition: Partition, plan: Plan, carry_out: Callable[[list[Action]], None]
    ) -> None:
        self._partition = partition
        self._carry_out = carry_out
        kinds = frozenset({FrameKind.DECISION, FrameKind.JOIN})
        self.line = ReconnectingConnection(
            reactor, self, lambda _: partition.make_hello("vote"), channel="vote", kinds=kinds,
            transport=partition.spec.network.transport, retry_s=_RETRY_S,
        )  # fmt: skip
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Connect to the coordinator of this plan; the connection stays if it is the same."""
        placement = plan.partitions[0]
        addresses, peer = list(placement.addresses), self._partition.process_id_of(0, placement.attempt)
        if (addresses, peer) != (self.line.addresses, self.line.peer):
            self.line.follow(addresses, peer)

    def join(self) -> None:
        """Send the version that is held, if it is whole, and the decision that made it; repeated at each welcome."""
        connection, state, member = self.line.connection, self._partition.state, self._partition.member
        if connection is not None and state is not None and state.is_filled:
            header = self._partition.header(kind=FrameKind.JOIN, step=member.step)
            connection.send(header, [Join(member.last_decision).pack()])

    def vote(self, vote: Vote) -> None:
        """Send a vote; it is repeated at each welcome."""
        if self.line.connection is not None:
            header = self._partition.header(kind=FrameKind.VOTE, step=vote.step)
            self.line.connection.send(header, [vote.pack()])

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
