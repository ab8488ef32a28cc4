"""A partition's snapshots: copied at a step boundary, written in the background, reported when they are durable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pscluster.errors import PsError
from pscluster.snapshot import Written
from pscluster.v1.plan_pb2 import ErrorDetail, ProcessReport, SnapshotPart
from pscluster.v1.plan_pb2 import (
    Warning as WarningMessage,
)
from psserver.partition.snapshots import SnapshotWriter
from psserver.partition.state import PartitionState
from psserver.partition.telemetry import PartitionCounters


class Saving:
    """On the partition's thread. `post` brings what the writing thread says there."""

    def __init__(
        self,
        job_id: str,
        store: Path,
        partition: int,
        num_partitions: int,
        counters: PartitionCounters,
        report: Callable[[ProcessReport], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self.writer: SnapshotWriter | None = None  # of a partition, whose files they are; a standby touches none
        self._store = store
        self._post = post
        self._job_id = job_id
        self._partition = partition
        self._num_partitions = num_partitions
        self._counters = counters
        self._report = report

    def begin(self) -> None:
        """This process is the partition from now on: what others had begun to write is void."""
        if self.writer is None:
            self.writer = SnapshotWriter(self._store, self._partition, self._post)

    def write(self, state: PartitionState, step: int, generation: int) -> None:
        """Copy the state, which is that of committed `step`, and have it written. Blocks only while two are waiting."""
        meta = state.meta(self._job_id, step, generation, self._partition, self._num_partitions)
        with self._counters.phase("snapshot"):
            pieces = state.pieces()
        assert self.writer is not None
        self.writer.write(
            meta, state.layout, pieces, lambda written, error: self._wrote(step, generation, written, error)
        )

    def retain(self, kept: Iterable[int]) -> None:
        """Delete what is older than the newest kept step and not kept."""
        if self.writer is not None:
            self.writer.retain(kept)

    def close(self) -> None:
        """Finish the snapshots that are begun."""
        if self.writer is not None:
            self.writer.close()

    def _wrote(self, step: int, generation: int, written: Written | None, error: PsError | None) -> None:
        if error is not None:
            detail = ErrorDetail(code=error.code, cause=error.cause, action=error.action, details=error.details)
            self._report(ProcessReport(warning=WarningMessage(error=detail, step=step)))
        elif written is not None:
            self._counters.snapshots += 1
            part = SnapshotPart(
                step=step,
                partition=self._partition,
                generation=generation,
                path=written.path.name,
                size_bytes=written.size_bytes,
                checksum=written.checksum,
            )
            self._report(ProcessReport(snapshot_part=part))
