"""What a standby must know beyond its state, so that whoever takes over goes on where the partition was. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from pscluster.v1.plan_pb2 import StepRecord

MAX_RECORDS = 10_000  # of steps that the master may not have heard of yet; it drops those that it knows


@dataclass(kw_only=True)
class Notes:
    """`saved`: the newest version that was to be written. `evaluated`: the newest one evaluated, -1 for none, and its
    `metrics`. `records`: of the newest steps, kept by the standby of the lead."""

    saved: int = 0
    evaluated: int = -1
    metrics: Mapping[str, float] = field(default_factory=dict)
    records: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=MAX_RECORDS))

    def to_json(self) -> dict[str, object]:
        """All but the records, for the standby."""
        return {"saved": self.saved, "evaluated": self.evaluated, "metrics": dict(self.metrics)}

    @classmethod
    def from_json(cls, told: Mapping[str, object]) -> Notes:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not give."""
        metrics = told["metrics"]
        if not isinstance(metrics, dict):
            raise TypeError("metrics are no mapping")
        return cls(
            saved=int(str(told["saved"])),
            evaluated=int(str(told["evaluated"])),
            metrics={str(name): float(value) for name, value in metrics.items()},
        )
