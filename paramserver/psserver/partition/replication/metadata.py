"""What a standby must know beyond its state, so that whoever takes over goes on where the partition was. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pscluster.v1.plan_pb2 import StepRecord
from pscluster.wire.partition_protocol import Evaluation, Metadata

MAX_RECORDS = 10_000  # of steps that the master may not have heard of yet; it drops those that it knows
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
        """Take what the partition sent; the records stay."""
        self.saved = metadata.saved
        self.evaluations = deque(metadata.evaluations, maxlen=MAX_EVALUATIONS)
