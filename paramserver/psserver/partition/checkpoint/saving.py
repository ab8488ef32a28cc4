"""A partition's snapshots: begun at a step boundary and reported when they are durable; and the way back to one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pscluster.agent.status import detail_of
from pscluster.errors import DamagedError, PsError, StorageError
from pscluster.job.spec import JobSpec
from pscluster.storage import Written, below
from pscluster.v1.plan_pb2 import Plan, ProcessReport, ProcessSpec, SnapshotPart
from pscluster.v1.plan_pb2 import Warning as WarningMessage
from pscluster.wire.reactor import Reactor
from psserver.partition.actions import Action, Report, ReportSteps
from psserver.partition.checkpoint.frozen import Frozen
from psserver.partition.checkpoint.snapshots import SharedStoreCheck, SnapshotWriter
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters


class Saving:
    """On the partition's thread. `post` runs a call of the writing thread there."""

    def __init__(
        self,
        start: ProcessSpec,
        spec: JobSpec,
        counters: PartitionCounters,
        carry_out: Callable[[list[Action]], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self.writer: SnapshotWriter | None = None  # of a partition, whose files they are; a standby touches none
        self._frozen: list[Frozen] = []  # what may still be written from the partition's memory
        self._store = start.store
        self._own_store = start.own_store
        self._post = post
        self._job_id = start.job_id
        self._partition = start.rank
        self._num_partitions = spec.servers.partitions
        self._every_steps = spec.durability.every_steps
        self._counters = counters
        self._carry_out = carry_out

    def begin(self) -> None:
        """This process is the partition from now on: unfinished files of earlier ones are deleted."""
        if self.writer is None:
            shared_store_check = None if self._own_store else SharedStoreCheck(self._partition, self._num_partitions)
            self.writer = SnapshotWriter(
                self._store,
                self._partition,
                self._post,
                every_steps=self._every_steps,
                copied=self._own_store,
                shared_store_check=shared_store_check,
                warn=self._warn,
            )

    def write(self, state: PartitionState, step: int, generation: int, *, last: bool) -> None:
        """Have the state, which is that of committed `step`, written. `last`: the job may end with it."""
        meta = state.meta(self._job_id, step, generation, self._partition, self._num_partitions)
        with self._counters.phase("snapshot"):
            pieces = Frozen(state.places())
        self._frozen = [*(frozen for frozen in self._frozen if not frozen.is_over), pieces]
        assert self.writer is not None
        self.writer.write(
            meta, state.layout, pieces, lambda written, error: self._wrote(step, generation, written, error), last=last
        )

    def overwriting(self, bucket: int) -> None:
        """A bucket is about to change: what of it is still to be written is copied."""
        if self._frozen:
            with self._counters.phase("snapshot"):
                for frozen in self._frozen:
                    frozen.preserve(bucket)

    def overwriting_all(self) -> None:
        """Everything is about to change."""
        for frozen in self._frozen:
            frozen.preserve_all()

    def retain(self, kept: Iterable[int]) -> None:
        """Delete what is older than the newest kept step and not kept."""
        if self.writer is not None:
            self.writer.retain(kept)

    def settled(self, path: str) -> None:
        """A part is on a second node, or never will be."""
        if self.writer is not None:
            self.writer.settled(path)

    def close(self) -> None:
        """Finish the snapshots that are begun."""
        if self.writer is not None:
            self.writer.close()

    def _wrote(self, step: int, generation: int, written: Written | None, error: PsError | None) -> None:
        if error is not None:
            error.details |= {"unwritten": str(step), "generation": str(generation)}
            self._warn(error, step)
        elif written is not None:
            self._counters.snapshots += 1
            part = SnapshotPart(
                step=step,
                partition=self._partition,
                generation=generation,
                path=written.name,
                size_bytes=written.size_bytes,
                checksum=written.checksum,
            )
            self._report(ProcessReport(snapshot_part=part))

    def _warn(self, error: PsError, step: int = 0) -> None:
        self._report(ProcessReport(warning=WarningMessage(error=detail_of(error), step=step)))

    def _report(self, report: ProcessReport) -> None:
        """Steps first: after a restore from this snapshot the steps before it are not reported again."""
        self._carry_out([ReportSteps(), Report(report)])


RESTORE_PATIENCE_S = 100.0
"""How long a process asks. Then it ends, and another asks in its place: six of them outlast ten minutes."""
RESTORE_RETRY_S = 2.0


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
        if now - self._since_s >= RESTORE_PATIENCE_S:
            return False
        self._reactor.call_later(RESTORE_RETRY_S, lambda: again(plan) if self._awaits is plan else None)
        return True
