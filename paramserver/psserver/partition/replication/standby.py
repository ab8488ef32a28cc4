"""What makes a partition a standby: it takes no trainers, but the state and the sums of its partition.

The sums arrive as PUSHes of the trees' roots, through the gate like any others; the complete step is acknowledged where
a partition would vote, and the decision is carried out by the same code. So a standby is a partition that only listens,
and taking over is beginning to speak.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from pscluster.errors import FrameError
from pscluster.storage.snapshot import PieceKey
from pscluster.wire.frame import Codec, FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Metadata, Sync
from pscluster.wire.protocol import StandbyWelcome
from psserver.partition.ingress.clients import Clients
from psserver.partition.replication.metadata import ReplicatedMetadata
from psserver.partition.step.commit import Member
from psserver.partition.step.state import PartitionState


class Listener(Protocol):
    """The process that stands by. Everything on its thread."""

    index: int
    state: PartitionState | None
    member: Member
    clients: Clients
    notes: ReplicatedMetadata

    def header(self, **fields: object) -> Header:
        """A header of this job, generation and sender."""

    def begin_at(self, step: int) -> None:
        """Forget every step; the state is, or will be, that of `step`."""

    def receive_decision(self, decision: CommitDecision) -> None:
        """Carry out a decision."""

    @property
    def is_updating(self) -> bool:
        """Whether a decision is being carried out."""


class Standby:
    """`is_synced`: it holds a state, and what came after it."""

    def __init__(self, listener: Listener) -> None:
        self.is_synced = False
        self._listener = listener
        self._targets: dict[PieceKey, memoryview] = {}
        self._missing: set[PieceKey] = set()

    @property
    def reach(self) -> int:
        """The version that it can make of what it holds; -1: none."""
        member = self._listener.member
        return member.step + (member.vote is not None) if self.is_synced else -1

    def welcome(self) -> StandbyWelcome:
        """What a partition is told that greets its standby."""
        return StandbyWelcome(reach=self.reach, applied=self._listener.member.step)

    def say_held(self) -> None:
        """Tell the partition what is held; repeating it is harmless."""
        for client in self._listener.clients.on("replica"):
            client.connection.send(self._listener.header(kind=FrameKind.HELD, step=self.reach))

    def hear(self, header: Header, body: memoryview) -> None:
        """A SYNC, a PIECE that has landed, a DECISION or METADATA."""
        if header.kind is FrameKind.SYNC:
            self._begin(header, Sync.unpack(body))
        elif header.kind is FrameKind.PIECE:
            self._missing.discard(_key(header))
            self._end_if_whole()
        elif not self.is_synced:
            raise FrameError(f"a {header.kind.name} before the state", details={"field": "kind"})
        elif header.kind is FrameKind.DECISION:
            self._decide(CommitDecision.unpack(body))
        else:
            self._listener.notes.receive(Metadata.unpack(body))

    def target(self, header: Header) -> memoryview:
        """Where a PIECE belongs. Raises FrameError for one that is not expected."""
        target = self._targets.get(_key(header))
        if target is None or _key(header) not in self._missing or header.codec is not Codec.FP32:
            raise FrameError(f"an unexpected piece {_key(header)}", details={"field": "bucket"})
        if header.length != target.nbytes:
            raise FrameError(
                f"a piece of {header.length} bytes where {target.nbytes} are expected", details={"field": "length"}
            )
        return target

    def resume_reading(self) -> None:
        """The update is done: the next decision may come."""
        for client in self._listener.clients.on("replica"):
            client.connection.resume_reading()

    def _begin(self, header: Header, sync: Sync) -> None:
        """A state is on its way: what was held until now is worth nothing."""
        listener = self._listener
        state = listener.state
        assert state is not None  # greeted only then
        if len(sync.update_counts) != len(state.layout.tensors):
            raise FrameError(f"{len(sync.update_counts)} update counts of a state", details={"field": "body"})
        self.is_synced = False
        state.reset()
        state.update_counts = sync.update_counts
        listener.begin_at(header.step)
        listener.member = replace(listener.member, last_decision=sync.decision)
        listener.notes = ReplicatedMetadata()
        listener.notes.receive(sync.metadata)
        self._targets = state.places()
        self._missing = set(self._targets)
        self._end_if_whole()

    def _end_if_whole(self) -> None:
        state = self._listener.state
        if self._missing or self.is_synced or state is None:
            return
        for span in state.spans:
            state.publish(span.bucket)
        state.filled = {span.bucket for span in state.spans}
        self._targets = {}
        self.is_synced = True
        self.say_held()

    def _decide(self, decision: CommitDecision) -> None:
        """The partition's generation may be another one; it is the plan that fences it, by its attempt."""
        listener = self._listener
        listener.receive_decision(replace(decision, generation=listener.member.generation))
        if listener.is_updating:
            for client in listener.clients.on("replica"):
                client.connection.pause_reading()  # a vote, and with it a decision, needs the update to be done


def _key(header: Header) -> PieceKey:
    return header.bucket, "values" if header.flags == 0 else f"moment{header.flags - 1}"
