"""Snapshots in the background: one thread writes what the partition copied, and deletes what is done with."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from queue import Queue

from pscluster.errors import InternalError, PsError, StorageError
from pscluster.layout import Layout
from pscluster.snapshot import Buffer, PartMeta, PieceKey, Written, part_name, write_part

Job = Callable[[], None]
_PART = re.compile(r"^step-(\d+)\.part-(\d+)\.generation-\d+\.snapshot$")


class SnapshotWriter:
    """Owns the files of one partition in the job's store. `post` has the callbacks run on the partition's thread."""

    def __init__(self, store: Path, partition: int, post: Callable[[Job], None]) -> None:
        self._store = store
        self._partition = partition
        self._post = post
        self._jobs: Queue[Job | None] = Queue(maxsize=1)  # a slow disk holds training back, not memory
        self._jobs.put(self._sweep)
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def write(
        self,
        meta: PartMeta,
        layout: Layout,
        pieces: Mapping[PieceKey, Buffer],
        done: Callable[[Written | None, PsError | None], None],
    ) -> None:
        """Write a part; `done` hears what was written, or why not. Blocks only while two others are waiting."""

        def job() -> None:
            written: Written | None = None
            error: PsError | None = None
            try:
                path = self._store / part_name(meta.step, meta.partition, meta.generation)
                written = write_part(path, meta, layout, pieces)
            except StorageError as problem:
                error = problem
            except Exception as problem:  # this thread must live: without it the next snapshot waits for ever
                error = InternalError(f"writing the snapshot of step {meta.step} failed: {problem!r}")
            self._post(lambda: done(written, error))

        self._jobs.put(job)

    def retain(self, kept: Iterable[int]) -> None:
        """Delete this partition's parts that are older than the newest kept step and not kept."""
        steps = set(kept)
        if steps:
            self._jobs.put(lambda: self._delete(steps))

    def close(self) -> None:
        """Finish what is begun; blocks for at most a few seconds."""
        self._jobs.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # with the copy that it wrote, while it waits for the next

    def _delete(self, kept: set[int]) -> None:
        newest = max(kept)
        for path in self._store.glob(f"step-*.part-{self._partition:04d}.*.snapshot"):
            match = _PART.match(path.name)
            if match and int(match[1]) < newest and int(match[1]) not in kept:
                with contextlib.suppress(OSError):  # tried again whenever the catalogue grows
                    path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what an earlier process of this partition had begun to write when it was killed."""
        for path in self._store.glob(f".step-*.part-{self._partition:04d}.*.writing"):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
