"""A partition's line to the lead: it joins, votes, and hears verdicts."""

from __future__ import annotations

from typing import Protocol

from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.reactor import Reactor
from psserver.partition import messages
from psserver.partition.reconnecting_connection import Caller, PeerLine
from psserver.partition.step.commit import Member, Verdict, Vote
from psserver.partition.step.state import PartitionState

_RETRY_S = (0.05, 0.05)  # the whole job waits for it


class Voter(Caller, Protocol):
    """What the uplink asks of its partition. Everything on the partition's thread."""

    state: PartitionState | None
    member: Member

    def hear_call(self) -> None:
        """The lead asks for the vote."""

    def hear_verdict(self, verdict: Verdict) -> None:
        """The lead's verdict."""


class Uplink:
    """For one timeline; on the partition's thread."""

    def __init__(self, reactor: Reactor, service: Voter, addresses: list[str]) -> None:
        self._service = service
        kinds = frozenset({FrameKind.VERDICT, FrameKind.JOIN})
        self._line = PeerLine(reactor, service, self, channel="vote", kinds=kinds, retry_s=_RETRY_S)
        self._line.follow(addresses)

    def close(self) -> None:
        """Hang up for good."""
        self._line.close()

    def follow(self, addresses: list[str]) -> None:
        """The lead is at these addresses from now on; the one before, if it still lives, is not spoken to."""
        if addresses != self._line.addresses:
            self._line.follow(addresses)

    def unreached_s(self, now_s: float) -> float:
        """For how long the lead has not taken a connection, by the monotonic clock. From any thread."""
        return self._line.unreached_s(now_s)

    def join(self) -> None:
        """Tell the lead which version is held, if it is, and the verdict that made it; told again at each welcome."""
        connection, state, member = self._line.connection, self._service.state, self._service.member
        if connection is not None and state is not None and state.is_filled:
            body = messages.pack_verdict(member.last_verdict) if member.last_verdict is not None else b""
            connection.send(self._service.header(kind=FrameKind.JOIN, step=member.step), [body])

    def vote(self, vote: Vote) -> None:
        """Send a vote; it is sent again at each welcome."""
        if self._line.connection is not None:
            header = self._service.header(kind=FrameKind.VOTE, step=vote.step)
            self._line.connection.send(header, [messages.pack_vote(vote)])

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - it says nothing that is needed
        self.join()
        self._service.hear_call()

    def heard(self, header: Header, body: memoryview) -> None:
        if header.kind is FrameKind.VERDICT:
            self._service.hear_verdict(messages.unpack_verdict(body))
        elif header.kind is FrameKind.JOIN:
            self._service.hear_call()

    def lost(self) -> None:
        """Nothing hangs on it: what was said is said again."""
