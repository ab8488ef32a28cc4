"""What ties a partition to its standby, as pure functions: which votes wait for it, and when the pair may be relied on.

The master has a standby take over without going back only if it was told that the two are in sync. So the tie comes
before the word: as soon as the standby holds a state, the partition votes on nothing that the standby has not
acknowledged; it tells the master once all it ever voted on is acknowledged. Only a plan unties them: one that names
another standby or none, or has everybody go back. Hence what the master believes is true, however late it hears.
(The same order as a replica's way into the in-sync set of Kafka's logs.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pscluster.v1.plan_pb2 import StepRecord


@dataclass(frozen=True, kw_only=True)
class InSyncState:
    """`attempt`: the standby that the plan names; 0: none. `reach`: the version that it can make of what it
    acknowledged; -1: it holds nothing. `is_bound`: votes wait for it. `is_told`: the master knows it to be in sync."""

    attempt: int = 0
    reach: int = -1
    is_bound: bool = False
    is_told: bool = False


def adopt(bond: InSyncState, attempt: int, *, restored: bool) -> InSyncState:
    """A plan names its standby: another one, or another timeline, begins with nothing."""
    return bond if attempt == bond.attempt and not restored else InSyncState(attempt=attempt)


def may_vote(bond: InSyncState, step: int) -> bool:
    """Whether the standby does not keep a complete step from being voted on."""
    return not bond.is_bound or bond.reach > step


def acknowledge(bond: InSyncState, reach: int, promised: int) -> tuple[InSyncState, bool]:
    """The standby can make version `reach`: the bond, and whether the master is to be told now that they are in sync.

    `promised`: the version that the votes cast so far may lead to."""
    reach = max(bond.reach, reach)
    tells = not bond.is_told and reach >= promised
    return replace(bond, reach=reach, is_bound=True, is_told=bond.is_told or tells), tells


def begin(bond: InSyncState) -> InSyncState | None:
    """A standby needs the whole state: the bond to begin again with. None: never, for the master relies on the pair."""
    return None if bond.is_told else InSyncState(attempt=bond.attempt)


def resumes(bond: InSyncState, reach: int, applied: int, step: int) -> bool:
    """Whether a standby that comes back over a new connection can be told what is missing, rather than everything.

    It can make version `reach` and has made `applied`; the partition's open step is `step`. At most the decision on the
    step before is missing, which the partition still has, and the sums of the open one."""
    return bond.is_bound and reach in (step, step + 1) and applied >= step - 1


MAX_RECORDS = 10_000  # of steps that the master may not have heard of yet; it drops those that it knows
MAX_EVALUATIONS = 100  # the same of evaluations


@dataclass(frozen=True)
class Evaluation:
    """Of version `step`; finalised."""

    step: int
    metrics: Mapping[str, float]


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

    def to_json(self) -> dict[str, object]:
        """All but the records, for the standby."""
        return {"saved": self.saved, "evaluations": [[e.step, dict(e.metrics)] for e in self.evaluations]}

    @classmethod
    def from_json(cls, told: Mapping[str, object]) -> ReplicatedMetadata:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not give."""
        listed = told["evaluations"]
        if not isinstance(listed, list):
            raise TypeError("evaluations are no list")
        found = cls(saved=int(str(told["saved"])))
        for step, metrics in listed:
            named = {str(name): float(value) for name, value in metrics.items()}
            found.evaluations.append(Evaluation(int(step), named))
        return found
