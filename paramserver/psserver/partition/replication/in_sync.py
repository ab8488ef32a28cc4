"""When a partition and its standby are in sync, and what a standby must know beyond the state. Pure.

The master has a standby take over without a restore only if it knows the two to be in sync. Hence the order, that of a
replica's way into the in-sync set of Kafka's logs: as soon as the standby holds a state, the partition votes on nothing
that the standby has not acknowledged; once every step it voted on is acknowledged, it reports the pair in sync. Only a
plan that names another standby or none, or orders a restore, ends this. So what the master knows is true, however late.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from pscluster.v1.plan_pb2 import StepRecord
from pscluster.wire.partition_protocol import Evaluation, Metadata


@dataclass(frozen=True, kw_only=True)
class InSyncState:
    """`attempt`: the standby that the plan names; 0: none. `acked_version`: the version that the standby can make of
    what it acknowledged; -1: none. `ack_required`: votes wait for the standby. `reported_in_sync`: to the master."""

    attempt: int = 0
    acked_version: int = -1
    ack_required: bool = False
    reported_in_sync: bool = False


def adopt(state: InSyncState, attempt: int, *, restored: bool) -> InSyncState:
    """A plan names its standby: another one, or a restore, begins with nothing."""
    return state if attempt == state.attempt and not restored else InSyncState(attempt=attempt)


def may_vote(state: InSyncState, step: int) -> bool:
    """Whether a complete step may be voted on: the standby holds it, or is not required to."""
    return not state.ack_required or state.acked_version > step


def acknowledge(state: InSyncState, acked_version: int, promised: int) -> tuple[InSyncState, bool]:
    """The standby acknowledges all of version `acked_version`: the new state, and whether the pair is to be reported in
    sync now. `promised`: the version that the votes sent so far may lead to."""
    acked = max(state.acked_version, acked_version)
    reports = not state.reported_in_sync and acked >= promised
    reported = state.reported_in_sync or reports
    return replace(state, acked_version=acked, ack_required=True, reported_in_sync=reported), reports


def begin(state: InSyncState) -> InSyncState | None:
    """A standby needs the whole state: the in-sync state to begin again with. None: the master relies on the pair."""
    return None if state.reported_in_sync else InSyncState(attempt=state.attempt)


def resumes(state: InSyncState, acked_version: int, applied: int, step: int) -> bool:
    """Whether a standby that reconnects can be sent what it misses, rather than everything.

    It can make version `acked_version` and has made `applied`; the partition's open step is `step`. At most the
    decision on the step before is missing, which the partition still has, and the sums of the open one."""
    return state.ack_required and acked_version in (step, step + 1) and applied >= step - 1


MAX_RECORDS = 10_000  # of steps whose report may be lost; the master drops those that it knows
MAX_EVALUATIONS = 100  # the same of evaluations


@dataclass(kw_only=True)
class ReplicatedMetadata:
    """`saved`: the newest version that was to be written. `evaluations`: the newest ones, in order. `records`: of the
    newest steps, kept by the standby of the coordinator."""

    saved: int = 0
    evaluations: deque[Evaluation] = field(default_factory=lambda: deque(maxlen=MAX_EVALUATIONS))
    records: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=MAX_RECORDS))

    @property
    def evaluated(self) -> int:
        """The newest evaluated version; -1: none."""
        return self.evaluations[-1].step if self.evaluations else -1

    def to_wire(self) -> Metadata:
        """All but the records, for the standby."""
        return Metadata(saved=self.saved, evaluations=tuple(self.evaluations))

    def receive(self, metadata: Metadata) -> None:
        """Take what the primary sent; the records stay."""
        self.saved = metadata.saved
        self.evaluations = deque(metadata.evaluations, maxlen=MAX_EVALUATIONS)
