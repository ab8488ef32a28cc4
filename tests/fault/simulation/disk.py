"""Disks that take time, fill up, and forget at a power loss what was not synced.

The files are real ones, in a directory of the run; so is the code that writes them. What a crash leaves behind is made
by hand: a torn metrics line, a half-written file, a file whose bytes never reached the disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pscluster.errors import PsError, StorageError
from pscluster.storage import Written
from pscluster.storage.snapshot import part_name
from psmaster.storage.manifest_publisher import Publisher
from psmaster.storage.metrics_file import FILE_NAME
from psmaster.storage.persistence import Archive, Writes
from psmaster.storage.sqlite import SqliteStore
from psmaster.storage.store import Batch
from psserver.partition.checkpoint import snapshot_writer
from psserver.partition.checkpoint.snapshot_writer import SharedStoreCheck, SnapshotWriter
from tests.fault.simulation.schedule import SOON_S, Condition, Life, Schedule, Strand
from tests.harness.memory_store import MemoryStore


class Syncs:
    """Stands in for `os` in pscluster.storage.directory: knows what reached the disk. Nothing is really synced."""

    def __init__(self) -> None:
        self._synced: set[int] = set()  # inodes
        self.unsynced: list[str] = []  # renamed into place before their bytes were on the disk

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        self._synced.add(os.fstat(descriptor).st_ino)

    def replace(self, source: str | Path, target: str | Path) -> None:
        inode = os.stat(source).st_ino
        if inode not in self._synced:
            self.unsynced.append(str(target))
        self._synced.discard(inode)
        os.replace(source, target)


class Disks:
    """The master's disk and the store that the servers share."""

    def __init__(self, sim: Any, *, sqlite: bool) -> None:
        self.sim = sim
        self.schedule: Schedule = sim.schedule
        memory = "/dev/shm"
        self.directory = Path(tempfile.mkdtemp(prefix="simulation-", dir=memory if os.path.isdir(memory) else None))
        self.syncs = Syncs()
        self.is_full = False
        self.master_writes: Callable[[], Any] | None = None  # what is being written
        self.kills_next_write = False  # the master dies in the middle of the next write
        self.slowness = 1.0
        self._sqlite = sqlite
        self._memory_store = MemoryStore()
        self._archive: Archive | None = None

    # the master's

    def archive(self) -> Archive:
        """What a master finds when it starts."""
        store = SqliteStore(self.directory / "master.db") if self._sqlite else self._memory_store
        self._archive = _Archive(store, self.directory, self)
        return self._archive

    def master_latency_s(self) -> float:
        return self.slowness * self.schedule.between(0.0005, 0.005)

    def master_crashes(self) -> None:
        """The master is gone. What it was writing is there, or not, or only what comes before the store."""
        work, self.master_writes = self.master_writes, None
        fate = self.schedule.random.choice(("whole", "nothing", "half"))
        archive = self._archive
        assert isinstance(archive, _Archive)
        if work is not None and fate != "nothing":
            archive.is_cut = fate == "half"
            try:
                work()
            except (_PowerCut, StorageError):
                self.schedule.tell("master: was cut off while it wrote")
        archive.close()
        if work is not None and fate != "whole":
            self._tear_metrics()

    def _tear_metrics(self) -> None:
        """A line of metrics was being appended."""
        for job in self.sim.jobs():
            path = self.directory / "jobs" / job.job_id / FILE_NAME
            if not job.state.ended and path.exists():
                with path.open("ab") as file:
                    file.write(b'{"step": 1, "lo')

    # the servers'

    def writer(
        self, store: str | Path, partition: int, post: Callable[..., None], *, every_steps: int, **watching: Any
    ) -> SnapshotWriter:
        """A writer of snapshots in virtual time, of the process whose reactor `post` is."""
        reactor: Any = getattr(post, "__self__", None)
        return _Writer(self, reactor.life, store, partition, post, every_steps, **watching)

    def power_loss(self) -> None:
        """What was not synced is torn."""
        for name in self.syncs.unsynced:
            if os.path.exists(name):
                os.truncate(name, os.path.getsize(name) // 2)
        self.syncs.unsynced.clear()

    def write_part(self, path: str | Path, *arguments: Any) -> Written:
        """pscluster.storage.snapshot.write_part, on a disk that may be full."""
        if self.is_full:
            raise StorageError(f"cannot write the snapshot {path}: no space left on the disk")
        return _REAL_WRITE_PART(path, *arguments)


_REAL_WRITE_PART = snapshot_writer.write_part


class _PowerCut(BaseException):
    """The process is gone in the middle of something."""


class _Archive(Archive):
    """The product's archive on a disk that may be full or lost."""

    def __init__(self, store: Any, directory: Path, disks: Disks) -> None:
        super().__init__(store, directory)
        self._disks = disks
        self.is_cut = False
        write = store.write if isinstance(store, SqliteStore) else MemoryStore.write.__get__(store)
        store.write = lambda batch: self._write(write, batch)

    def save(self, writes: Writes) -> None:
        if self._disks.is_full:
            raise StorageError("cannot write: no space left on the disk")
        super().save(writes)

    def _write(self, write: Callable[[Batch], None], batch: Batch) -> None:
        if self.is_cut:
            raise _PowerCut
        write(batch)


class _Writer(SnapshotWriter):
    """The product's writer on a strand, whose disk takes a while for everything."""

    def __init__(
        self,
        disks: Disks,
        life: Life,
        store: str | Path,
        partition: int,
        post: Callable[..., None],
        every_steps: int,
        copied: bool,
        shared_store_check: SharedStoreCheck | None,
        warn: Callable[[PsError], None],
    ) -> None:
        self._disks = disks
        self._strand = Strand(life, self._run)
        self._writes = False
        life.at_end.append(self._cut)
        super().__init__(
            store,
            partition,
            post,
            every_steps=every_steps,
            copied=copied,
            shared_store_check=shared_store_check,
            warn=warn,
        )

    def _begin(self) -> None:
        self._changed: Any = Condition(self._strand, 0.0)
        self._strand.begin()

    def close(self) -> None:
        """The process ends; what is begun ends with it."""

    def _attempt(self, work: Callable[[], None]) -> None:
        self._take_time()
        super()._attempt(work)
        self._disks.sim.monitor.files_changed()

    def _write(self, wish: Any) -> None:
        self._writes = True
        self._take_time()
        super()._write(wish)
        self._writes = False

    def _take_time(self) -> None:
        schedule = self._disks.schedule
        self._strand.spend(SOON_S + self._disks.slowness * schedule.between(0.002, 0.05))

    def _cut(self) -> None:
        """Killed while it wrote: a part of a file is left."""
        directory = Path(self._location)
        if self._writes and directory.is_dir():
            torn = directory / f".{part_name(0, self._partition, 0)}.writing"
            torn.write_bytes(b"PSSNAP02 torn")


class ImmediatePublisher(Publisher):
    """The product's publisher of manifests, which does at once what it is asked for."""

    def __init__(self, bundle_file: Any) -> None:
        self.report_error = lambda _job_id, _step, _error: None
        self._bundle_file = bundle_file
        self._published = {}

    def _request(self, requests: Any, *, wait: bool = True) -> None:  # noqa: ARG002 - there is nothing to wait for
        for job_id, request in requests.items():
            self._carry_out(job_id, request)

    def close(self) -> None:
        """Nothing runs."""
