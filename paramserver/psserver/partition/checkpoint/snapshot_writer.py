"""Snapshots in the background: one thread writes what the partition held, and deletes what is done with.

A store that is slower than snapshots come never holds training back: one snapshot is being written, at most one waits,
and a third is left out, with a warning: a step that one partition leaves out never becomes complete.
Where the node's own disk is the store, a snapshot is being written until a second node has it."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from pscluster.errors import InternalError, PsError, StorageError
from pscluster.step.layout import Layout
from pscluster.storage import Written, below, open_store
from pscluster.storage.snapshot import PartMeta, Pieces, parse_part_name, part_name, write_part

Done = Callable[[Written | None, PsError | None], None]
ALWAYS = 64  # above the roundness of every step but 0
_log = structlog.get_logger(__name__)


def roundness(step: int, every_steps: int) -> int:
    """How often step / every_steps is divisible by 2; -1: the step is no multiple of `every_steps`.

    Of two snapshots that wait, the rounder is kept, and of equals the newer. Whatever the partitions' disks do,
    they then agree on some: where no write takes longer than 2^m intervals, every 2^m-th snapshot is written
    by all, since a rounder one comes no sooner than 2^m intervals later. (The newest alone would not do: two equally
    slow disks half a write apart could alternate for ever and never write the same step.)"""
    number, rest = divmod(step, every_steps)
    if rest:
        return -1
    return (number & -number).bit_length() - 1 if number else ALWAYS


@dataclass(kw_only=True)
class SnapshotRequest:
    """A snapshot to be written. The one of the greatest rank is first."""

    meta: PartMeta
    layout: Layout
    pieces: Pieces = field(repr=False)
    done: Done
    rank: tuple[int, bool, int, int]  # a newer generation makes older ones void; then the last, the rounder, the newer


class SnapshotWriter:
    """Owns the files of one partition in the job's store. `post` has the callbacks run on the partition's thread.

    No method but `close` blocks."""

    def __init__(
        self,
        store: str | Path,
        partition: int,
        post: Callable[[Callable[[], None]], None],
        *,
        every_steps: int,
        copied: bool = False,
        shared_store_check: SharedStoreCheck | None = None,
        warn: Callable[[PsError], None] = lambda _: None,
    ):
        """`copied`: the agent copies each part, and calls `settled` then. `shared_store_check`: looks for the other
        partitions' files; `warn` is called with what it finds, on the partition's thread."""
        self._location = str(store)
        self._partition = partition
        self._every_steps = every_steps
        self._copied = copied
        self._post = post
        self._shared_store_check = shared_store_check
        self._warn = warn
        self._changed = threading.Condition()
        self._waiting: SnapshotRequest | None = None
        self._unsettled = ""  # the part that is being copied
        self._recycled_file = ""  # the last deleted part, over which the next is written
        self._kept: frozenset[int] = frozenset()  # to delete by; empty: nothing to delete
        self._closing = False
        self._begin()

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def write(self, meta: PartMeta, layout: Layout, pieces: Pieces, done: Done, *, last: bool = False) -> None:
        """Write a part as soon as the store is free; the pieces are ended then, and `done` gets what was written, or
        the error. `last`: no other may take its place."""
        rank = (meta.generation, last, roundness(meta.step, self._every_steps), meta.step)
        request = SnapshotRequest(meta=meta, layout=layout, pieces=pieces, done=done, rank=rank)
        with self._changed:
            held = self._waiting
            first, left_out = (request, held) if held is None or request.rank >= held.rank else (held, request)
            self._waiting = first
            self._changed.notify()
        if left_out is not None:
            left_out.pieces.end()
            self._post(functools.partial(left_out.done, None, _left_out(left_out.meta.step, first.meta.step)))

    def retain(self, kept: Iterable[int]) -> None:
        """Delete this partition's parts that are older than the newest kept step and not kept."""
        steps = frozenset(kept)
        if steps:
            with self._changed:
                self._kept = steps
                self._changed.notify()

    def settled(self, path: str) -> None:
        """The agent has copied a part, or has given up; of an earlier process's it changes nothing."""
        with self._changed:
            if path == self._unsettled:
                self._unsettled = ""
                self._changed.notify()

    def close(self) -> None:
        """Finish what is begun and what waits; blocks for at most a few seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        self._attempt(self._sweep)
        while True:
            kept, request = self._next()
            if kept:
                self._attempt(functools.partial(self._delete, kept))  # first: it frees space
            if request is not None:
                self._write(request)
            elif not kept:
                self._attempt(self._delete_recycled)
                return
            del request  # with what it holds, while the next is waited for

    def _attempt(self, work: Callable[[], None]) -> None:
        """Tidying up: what fails is tried again whenever the catalogue grows, or by the next process."""
        try:
            work()
        except PsError as error:
            _log.warning("old files of snapshots remain for now", code=error.code, cause=error.cause)
        except Exception:  # this thread must live: without it there are no more snapshots
            _log.exception("old files of snapshots remain for now")

    def _next(self) -> tuple[frozenset[int], SnapshotRequest | None]:
        """What is to be done now; nothing at all: the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._kept or self._closing or (self._waiting and not self._unsettled))
            kept, self._kept = self._kept, frozenset()
            if self._unsettled and not self._closing:
                return kept, None
            request, self._waiting = self._waiting, None
            return kept, request

    def _write(self, request: SnapshotRequest) -> None:
        written: Written | None = None
        error: PsError | None = None
        meta = request.meta
        location = below(self._location, part_name(meta.step, meta.partition, meta.generation))
        try:
            written = write_part(location, meta, request.layout, request.pieces, self._recycled_file)
            self._recycled_file = ""
        except StorageError as problem:
            error = problem
        except Exception as problem:  # this thread must live: without it there are no more snapshots
            error = InternalError(f"writing the snapshot of step {meta.step} failed: {problem!r}")
        request.pieces.end()
        if self._copied and written is not None:
            with self._changed:
                self._unsettled = written.name
        self._post(functools.partial(request.done, written, error))

    def _delete(self, kept: frozenset[int]) -> None:
        store, newest = open_store(self._location), max(kept)
        names = store.names()
        self._check_sharing(names)
        for name in names:
            step = self._step_of(name)
            if step is not None and step < newest and step not in kept:
                if self._recycled_file:
                    store.delete(name)
                else:
                    self._recycled_file = store.set_aside(name)

    def _check_sharing(self, names: Iterable[str]) -> None:
        """The catalogue has a snapshot of all: are the others' files here?"""
        if self._shared_store_check is not None:
            seen = {part.partition for part in map(parse_part_name, names) if part}
            if error := self._shared_store_check.check(self._location, seen, time.monotonic()):
                self._post(functools.partial(self._warn, error))

    def _delete_recycled(self) -> None:
        if self._recycled_file:
            open_store(self._location).sweep(lambda name: name == self._recycled_file)

    def _sweep(self) -> None:
        """Delete what an earlier process of this partition had begun to write, or set aside, when it was killed."""
        open_store(self._location).sweep(lambda name: self._step_of(name) is not None)

    def _step_of(self, name: str) -> int | None:
        """The step of one of this partition's files; None for any other file."""
        part = parse_part_name(name)
        return part.step if part and part.partition == self._partition else None


def _left_out(step: int, other: int) -> StorageError:
    return StorageError(
        f"the snapshot of step {step} is left out: the store is still busy, and that of step {other} is written first",
        action="use a faster store, or raise durability.every_steps",
    )


SHARING_PATIENCE_S = 90.0  # network file systems show another's new files late, by default up to a minute


class SharedStoreCheck:
    """On the thread that writes snapshots. `partition` is one's own of `num_partitions`."""

    def __init__(self, partition: int, num_partitions: int) -> None:
        self._others = frozenset(range(num_partitions)) - {partition}
        self._since_s = math.inf  # when another partition's files were first missing
        self._reported = False

    def check(self, location: str, seen: Iterable[int], now_s: float) -> StorageError | None:
        """After the catalogue has a snapshot of all partitions: what is wrong when only the files of the partitions
        `seen` are there. Told once; None: nothing, or nothing new."""
        missing = sorted(self._others.difference(seen))
        if not missing or self._reported:
            self._since_s = math.inf
            return None
        self._since_s = min(self._since_s, now_s)
        if now_s - self._since_s < SHARING_PATIENCE_S:
            return None
        self._reported = True
        names = ", ".join(f"partition-{index}" for index in missing)
        return StorageError(
            f"{location} shows nothing that {names} wrote there: it is not shared, and a lost partition that starts "
            "elsewhere would find no snapshot",
            action="mount it on all servers, start each psserver with --own-store, or set durability.store",
        )
