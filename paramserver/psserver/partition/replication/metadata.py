"""What a standby must know beyond its state, so that whoever takes over goes on where the partition was. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from pscluster.v1.plan_pb2 import StepRecord

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
