"""A partition's snapshots: begun at a step boundary, written in the background, reported when they are durable."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pscluster.agent.status import detail_of
from pscluster.errors import PsError
from pscluster.job.spec import JobSpec
from pscluster.storage import Written
from pscluster.v1.plan_pb2 import ProcessReport, ProcessSpec, SnapshotPart
from pscluster.v1.plan_pb2 import Warning as WarningMessage
from psserver.partition.checkpoint.frozen import Frozen
from psserver.partition.checkpoint.shared_store_check import SharedStoreCheck
from psserver.partition.checkpoint.snapshots import SnapshotWriter
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters


class Saving:
    """On the partition's thread. `post` brings what the writing thread says there."""

    def __init__(
        self,
        start: ProcessSpec,
        spec: JobSpec,
        counters: PartitionCounters,
        report: Callable[[ProcessReport], None],
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
        self._report = report

    def begin(self) -> None:
        """This process is the partition from now on: what others had begun to write is void."""
        if self.writer is None:
            sharing = None if self._own_store else SharedStoreCheck(self._partition, self._num_partitions)
            self.writer = SnapshotWriter(
                self._store,
                self._partition,
                self._post,
                every_steps=self._every_steps,
                copied=self._own_store,
                sharing=sharing,
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
            meta,
            state.layout,
            pieces,
            lambda written, error: self._wrote(step, generation, written, error),
            last=last,
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
        detail = detail_of(error)
        self._report(ProcessReport(warning=WarningMessage(error=detail, step=step)))
