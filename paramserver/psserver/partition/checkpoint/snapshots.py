"""Snapshots in the background: one thread writes what the partition held, and deletes what is done with.

A store that is slower than snapshots come never holds training back: one snapshot is being written, at most one waits,
and what finds the place taken is left out. A step that one partition leaves out never becomes complete; it is told.
Where the node's own disk is the store, a snapshot is being written until a second node has it.
"""

from __future__ import annotations

import functools
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
from psserver.partition.checkpoint.shared_store_check import SharedStoreCheck

Done = Callable[[Written | None, PsError | None], None]
ALWAYS = 64  # above the roundness of every step but 0
_log = structlog.get_logger(__name__)


def roundness(step: int, every_steps: int) -> int:
    """How often the snapshot's number is divisible by 2; -1 beside the grid of `every_steps`.

    When two snapshots want the one waiting place, the rounder has it, and of equals the newer. Whatever the partitions'
    disks do, they then agree on some: where no write takes longer than 2^m intervals, every 2^m-th snapshot is written
    by all, since a rounder one comes no sooner than 2^m intervals later. (The newest alone would not do: two equally
    slow disks half a write apart could take turns for ever and never write the same step.)"""
    number, rest = divmod(step, every_steps)
    if rest:
        return -1
    return (number & -number).bit_length() - 1 if number else ALWAYS


@dataclass(kw_only=True)
class _ManifestRequest:
    """A snapshot that wants to be written. Greater goes first."""

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
        sharing: SharedStoreCheck | None = None,
        warn: Callable[[PsError], None] = lambda _: None,
    ):
        """`copied`: the agent copies each part, and says when it is `settled`. `sharing`: what looks for the other
        partitions' files; `warn` hears, on the partition's thread, of what it finds."""
        self._location = str(store)
        self._partition = partition
        self._every_steps = every_steps
        self._copied = copied
        self._post = post
        self._sharing = sharing
        self._warn = warn
        self._changed = threading.Condition()
        self._waiting: _ManifestRequest | None = None
        self._unsettled = ""  # the part that is being copied
        self._room = ""  # the last part that was deleted, in whose room the next is written
        self._kept: frozenset[int] = frozenset()  # to delete by; empty: nothing to delete
        self._closing = False
        self._begin()

    def _begin(self) -> None:
        """Work in the background from now on."""
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def write(self, meta: PartMeta, layout: Layout, pieces: Pieces, done: Done, *, last: bool = False) -> None:
        """Write a part as soon as the store is free; `done` hears what was written, or why it was not. The pieces are
        ended then. `last`: no other may take its place."""
        rank = (meta.generation, last, roundness(meta.step, self._every_steps), meta.step)
        wish = _ManifestRequest(meta=meta, layout=layout, pieces=pieces, done=done, rank=rank)
        with self._changed:
            held = self._waiting
            first, left_out = (wish, held) if held is None or wish.rank >= held.rank else (held, wish)
            self._waiting = first
            self._changed.notify()
        if left_out is not None:
            left_out.pieces.end()
            self._tell(left_out.done, None, _left_out(left_out.meta.step, first.meta.step))

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
            kept, wish = self._next()
            if kept:
                self._attempt(functools.partial(self._delete, kept))  # first: it makes room
            if wish is not None:
                self._write(wish)
            elif not kept:
                self._attempt(self._give_back)
                return
            del wish  # with what it holds, while the next is waited for

    def _attempt(self, work: Callable[[], None]) -> None:
        """Tidying up: what fails is tried again whenever the catalogue grows, or by the next process."""
        try:
            work()
        except PsError as error:
            _log.warning("old files of snapshots remain for now", code=error.code, cause=error.cause)
        except Exception:  # this thread must live: without it there are no more snapshots
            _log.exception("old files of snapshots remain for now")

    def _next(self) -> tuple[frozenset[int], _ManifestRequest | None]:
        """What is to be done now; nothing at all: the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._kept or self._closing or (self._waiting and not self._unsettled))
            kept, self._kept = self._kept, frozenset()
            if self._unsettled and not self._closing:
                return kept, None
            wish, self._waiting = self._waiting, None
            return kept, wish

    def _write(self, wish: _ManifestRequest) -> None:
        written: Written | None = None
        error: PsError | None = None
        meta = wish.meta
        location = below(self._location, part_name(meta.step, meta.partition, meta.generation))
        try:
            written = write_part(location, meta, wish.layout, wish.pieces, self._room)
            self._room = ""
        except StorageError as problem:
            error = problem
        except Exception as problem:  # this thread must live: without it there are no more snapshots
            error = InternalError(f"writing the snapshot of step {meta.step} failed: {problem!r}")
        wish.pieces.end()
        if self._copied and written is not None:
            with self._changed:
                self._unsettled = written.name
        self._tell(wish.done, written, error)

    def _tell(self, done: Done, written: Written | None, error: PsError | None) -> None:
        self._post(lambda: done(written, error))

    def _delete(self, kept: frozenset[int]) -> None:
        store, newest = open_store(self._location), max(kept)
        names = store.names()
        self._look(names)
        for name in names:
            step = self._step_of(name)
            if step is not None and step < newest and step not in kept:
                if self._room:
                    store.delete(name)
                else:
                    self._room = store.set_aside(name)

    def _look(self, names: Iterable[str]) -> None:
        """The catalogue has a snapshot of all: are the others' files here?"""
        if self._sharing is not None:
            seen = {part.partition for part in map(parse_part_name, names) if part}
            if error := self._sharing.look(self._location, seen, time.monotonic()):
                self._post(functools.partial(self._warn, error))

    def _give_back(self) -> None:
        if self._room:
            open_store(self._location).sweep(lambda name: name == self._room)

    def _sweep(self) -> None:
        """Delete what an earlier process of this partition had begun to write, or set aside, when it was killed."""
        open_store(self._location).sweep(lambda name: self._step_of(name) is not None)

    def _step_of(self, name: str) -> int | None:
        """The step of one of this partition's files; None for any other file."""
        part = parse_part_name(name)
        return part.step if part and part.partition == self._partition else None


def _left_out(step: int, other: int) -> StorageError:
    return StorageError(
        f"the snapshot of step {step} is left out: the store is still busy, and that of step {other} goes first",
        action="use a faster store, or raise durability.every_steps",
    )
