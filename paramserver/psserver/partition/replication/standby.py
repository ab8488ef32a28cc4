"""A standby: it serves no trainers, but receives the state and the sums of its primary.

The sums arrive as PUSHes of the trees' roots, through the gate; a complete step is acknowledged where a partition would
vote, and the same code carries out the decision. So it holds the same bits at every step."""

from __future__ import annotations

from dataclasses import replace

from pscluster.errors import FrameError
from pscluster.storage.snapshot import PieceKey
from pscluster.wire.frame import Codec, FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Metadata, Sync
from pscluster.wire.protocol import StandbyWelcome
from psserver.partition.actions import Action, AdoptMetadata, BeginAt, SendHeld
from psserver.partition.step.machine import StepMachine
from psserver.partition.step.state import PartitionState


class Standby:
    """`is_synced`: it holds a state, and what came after it. Calls return what is to be done, in order."""

    def __init__(self, state: PartitionState, machine: StepMachine) -> None:
        self.is_synced = False
        self._state = state
        self._machine = machine
        self._targets: dict[PieceKey, memoryview] = {}
        self._missing: set[PieceKey] = set()

    @property
    def acked_version(self) -> int:
        """The version that it can make of what it holds; -1: none."""
        member = self._machine.member
        return member.step + (member.vote is not None) if self.is_synced else -1

    def welcome(self) -> StandbyWelcome:
        """What the primary learns when it connects."""
        return StandbyWelcome(reach=self.acked_version, applied=self._machine.member.step)

    def receive(self, header: Header, body: memoryview) -> list[Action]:
        """A SYNC, a PIECE that has landed, a DECISION or METADATA."""
        if header.kind is FrameKind.SYNC:
            return self._begin(header, Sync.unpack(body))
        if header.kind is FrameKind.PIECE:
            self._missing.discard(_key(header))
            return self._end_if_whole()
        if not self.is_synced:
            raise FrameError(f"a {header.kind.name} before the state", details={"field": "kind"})
        if header.kind is FrameKind.DECISION:
            # The primary's generation may be another one; it is the plan that fences it, by its attempt.
            decision = replace(CommitDecision.unpack(body), generation=self._machine.member.generation)
            return self._machine.receive_decision(decision)
        return [AdoptMetadata(Metadata.unpack(body))]

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

    def _begin(self, header: Header, sync: Sync) -> list[Action]:
        """A whole state follows: drop what was held until now."""
        state = self._state
        if len(sync.update_counts) != len(state.layout.tensors):
            raise FrameError(
                f"a SYNC with {len(sync.update_counts)} update counts, which is not one for each tensor",
                details={"field": "body"},
            )
        self.is_synced = False
        state.reset()
        state.update_counts = sync.update_counts
        self._targets = state.places()
        self._missing = set(self._targets)
        return [BeginAt(header.step, sync.decision, sync.metadata), *self._end_if_whole()]

    def _end_if_whole(self) -> list[Action]:
        if self._missing or self.is_synced:
            return []
        state = self._state
        for span in state.spans:
            state.publish(span.bucket)
        state.filled = {span.bucket for span in state.spans}
        self._targets = {}
        self.is_synced = True
        return [SendHeld()]


def _key(header: Header) -> PieceKey:
    return header.bucket, "values" if header.flags == 0 else f"moment{header.flags - 1}"
