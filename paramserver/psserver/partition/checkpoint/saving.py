"""A partition's snapshots: begun at a step boundary and reported when they are durable; and the way back to one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from pscluster.agent.status import detail_of
from pscluster.errors import DamagedError, PsError, StorageError
from pscluster.job.spec import JobSpec
from pscluster.storage import Buffer, Live, Written, below
from pscluster.storage.snapshot import PieceKey
from pscluster.v1.plan_pb2 import Plan, ProcessReport, ProcessSpec, SnapshotPart
from pscluster.v1.plan_pb2 import Warning as WarningMessage
from pscluster.wire.reactor import Reactor
from psserver.partition.actions import Action, Report, ReportSteps
from psserver.partition.checkpoint.snapshot_writer import SharedStoreCheck, SnapshotWriter
from psserver.partition.step.state import PartitionState, huge_page_memory
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
        self._start = start
        self._post = post
        self._spec = spec
        self._partition = start.rank
        self._counters = counters
        self._carry_out = carry_out

    def begin(self) -> None:
        """This process is the partition from now on: unfinished files of earlier ones are deleted."""
        if self.writer is None:
            own = self._start.own_store
            shared_store_check = None if own else SharedStoreCheck(self._partition, self._spec.servers.partitions)
            self.writer = SnapshotWriter(
                self._start.store,
                self._partition,
                self._post,
                every_steps=self._spec.durability.every_steps,
                copied=own,
                shared_store_check=shared_store_check,
                warn=self._warn,
            )

    def write(self, state: PartitionState, step: int, generation: int, *, last: bool) -> None:
        """Have the state, which is that of committed `step`, written. `last`: the job may end with it."""
        meta = state.meta(self._start.job_id, step, generation, self._partition, self._spec.servers.partitions)
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
        for frozen in self._frozen:
            frozen.preserve_all()

    def retain(self, kept: Iterable[int]) -> None:
        """Delete what is older than the newest kept step and not kept."""
        if self.writer is not None:
            self.writer.retain(kept)

    def settled(self, path: str) -> None:
        if self.writer is not None:
            self.writer.settled(path)

    def close(self) -> None:
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


RESTORE_PATIENCE_S = 100.0  # then the process is replaced: with all losses it may have, a job waits ten minutes
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
        """Make the state that of the plan's resume step; nothing at step 0. Raises DamagedError, which names the
        snapshot: the master falls back to an older one; StorageError when the store cannot be read, see `wait`."""
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
            warning = WarningMessage(error=detail_of(error), step=plan.resume_step)
            self._report(ProcessReport(warning=warning))
        self._awaits = plan
        if now - self._since_s >= RESTORE_PATIENCE_S:
            return False
        self._reactor.call_later(RESTORE_RETRY_S, lambda: again(plan) if self._awaits is plan else None)
        return True


# ---- what a snapshot is written from ----


CHUNK_BYTES = 4 << 20  # the unit of a write, repeated when the memory was overwritten during it


class Frozen:
    """Made, and warned of what is about to change, by the partition's thread; read by the one that writes (`Pieces`).
    Neither waits for the other longer than a copy takes. `places`: the memory, which the partition goes on updating."""

    def __init__(self, places: Mapping[PieceKey, memoryview]) -> None:
        self._lock = threading.Lock()
        self._sources = {key: memoryview(place).cast("B") for key, place in places.items()}
        self._sizes = {key: source.nbytes for key, source in self._sources.items()}
        self._live = set(self._sources)  # what still lies in the partition's memory

    @property
    def is_over(self) -> bool:
        return not self._sources

    # ---- the partition's thread ----

    def preserve(self, bucket: int) -> None:
        """The bucket is about to be overwritten: copy what of it was not written yet."""
        with self._lock:
            for key in [key for key in self._sizes if key[0] == bucket and key in self._live]:
                self._live.discard(key)
                self._sources[key] = _copied(self._sources[key])

    def preserve_all(self) -> None:
        for bucket in sorted({bucket for bucket, _ in self._sizes}):
            self.preserve(bucket)

    # ---- the writing thread ----

    def sizes(self) -> Mapping[PieceKey, int]:
        return self._sizes

    def chunks(self, key: PieceKey) -> Iterator[Live]:
        for at in range(0, self._sizes[key], CHUNK_BYTES):
            with self._lock:
                memory = self._sources[key][at : at + CHUNK_BYTES]
                instead = partial(self._instead, key, at) if key in self._live else _nothing
            yield Live(memory, instead)
        self._drop(key)

    def _instead(self, key: PieceKey, at: int) -> Buffer | None:
        with self._lock:
            return None if key in self._live else self._sources[key][at : at + CHUNK_BYTES]

    def end(self) -> None:
        for key in list(self._sizes):
            self._drop(key)

    def _drop(self, key: PieceKey) -> None:
        with self._lock:
            self._live.discard(key)
            self._sources.pop(key, None)


def _nothing() -> None:
    """A copy is never overwritten."""


def _copied(source: memoryview) -> memoryview:
    copied = huge_page_memory(source.nbytes)
    copied[:] = source
    return copied
