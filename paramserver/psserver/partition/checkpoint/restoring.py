"""A partition's way back to a snapshot. A store that does not answer is asked again: nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable

from pscluster.agent.status import detail_of
from pscluster.errors import DamagedError, PsError, StorageError
from pscluster.storage import below
from pscluster.v1.plan_pb2 import Plan, ProcessReport, ProcessSpec
from pscluster.v1.plan_pb2 import Warning as WarningMessage
from pscluster.wire.reactor import Reactor
from psserver.partition.step.state import PartitionState

PATIENCE_S = 100.0
"""How long a process asks. Then it ends, and another asks in its place: six of them outlast ten minutes."""
RETRY_S = 2.0


class Restoring:
    """On the partition's thread, which reading blocks; beats have a thread of their own."""

    def __init__(self, start: ProcessSpec, reactor: Reactor, report: Callable[[ProcessReport], None]) -> None:
        self._start = start
        self._reactor = reactor
        self._report = report
        self._awaits: Plan | None = None  # the newest plan, while its snapshot cannot be read
        self._since_s = 0.0

    def restore(self, state: PartitionState, plan: Plan, num_partitions: int) -> None:
        """Make the state that of the plan's resume step: this partition's part of that snapshot; nothing at step 0.

        Raises DamagedError, which names the snapshot: the master falls back to an older one. Raises StorageError when
        the store cannot be read; see `wait`."""
        if plan.resume_step:
            partition = self._start.rank
            part = next(part for part in plan.restore.parts if part.partition == partition)
            try:
                state.load(below(self._start.store, part.path), partition, num_partitions, plan.resume_step)
            except DamagedError as error:
                error.details["void_snapshot"] = str(plan.resume_step)
                raise
        else:
            state.reset()
        self._awaits = None

    def wait(self, plan: Plan, error: PsError, again: Callable[[Plan], None]) -> bool:
        """Whether it is worth waiting after an error; `again` is then called, unless a newer plan came to wait."""
        if isinstance(error, DamagedError) or not isinstance(error, StorageError):
            return False
        now = time.monotonic()
        if self._awaits is None:
            self._since_s = now
            detail = detail_of(error)
            self._report(ProcessReport(warning=WarningMessage(error=detail, step=plan.resume_step)))
        self._awaits = plan
        if now - self._since_s >= PATIENCE_S:
            return False
        self._reactor.call_later(RETRY_S, lambda: again(plan) if self._awaits is plan else None)
        return True
