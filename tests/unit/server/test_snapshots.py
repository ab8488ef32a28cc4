"""The snapshot thread: writes, says so, deletes what is done with, never dies, and never holds training back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.held_pieces import Held, write_part
from pscluster.errors import InternalError, PsError, StorageError
from pscluster.step.layout import Layout, TensorSpec
from pscluster.storage import Written
from pscluster.storage.snapshot import PartMeta, part_name, read_part
from psserver.partition.checkpoint import snapshot_writer
from psserver.partition.checkpoint.snapshot_writer import ALWAYS, SnapshotWriter, roundness

LAYOUT = Layout((TensorSpec(names=("w",), shape=(4,), dtype="float32", kind="trained"),))
DEADLINE_S = 20.0


@dataclass
class Desk:
    """A writer, and what it posted to the partition's thread."""

    store: Path
    writer: SnapshotWriter
    posted: Queue[Any]
    received: list[tuple[Written | None, PsError | None]] = field(default_factory=list)

    def write(self, step: int, *, generation: int = 1) -> tuple[Written | None, PsError | None]:
        meta = PartMeta(job="job", step=step, generation=generation, partition=0, num_partitions=1, update_counts=(0,))
        self.writer.write(
            meta, LAYOUT, Held({(0, "values"): bytes(64)}), lambda *reported: self.received.append(reported)
        )
        self.posted.get(timeout=DEADLINE_S)()
        return self.received[-1]

    def steps(self) -> list[int]:
        names = [name for name in os.listdir(self.store) if not name.startswith(".")]
        return sorted(int(name.split(".")[0].removeprefix("step-")) for name in names)

    def hidden(self) -> list[Path]:
        return list(self.store.glob(".*"))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    posted: Queue[Any] = Queue()
    made = Desk(tmp_path / "store", SnapshotWriter(tmp_path / "store", 0, posted.put, every_steps=1), posted)
    yield made
    made.writer.close()


def test_a_part_is_written_and_told(desk: Desk) -> None:
    written, error = desk.write(3)

    assert error is None and written is not None
    assert written.name == part_name(3, 0, 1)
    assert read_part(desk.store / written.name).meta.step == 3


def test_only_older_parts_of_its_own_that_are_not_kept_are_deleted(desk: Desk) -> None:
    for step in (1, 2, 3, 4, 5):
        desk.write(step)
    desk.write(2, generation=4)
    other = PartMeta(job="job", step=1, generation=1, partition=1, num_partitions=2, update_counts=(0,))
    theirs = write_part(desk.store / part_name(1, 1, 1), other, LAYOUT, {})
    (desk.store / "step-1.part-0000.notes").write_text("not ours")

    desk.writer.retain([2, 4])
    desk.writer.close()

    left = set(os.listdir(desk.store))
    assert left == {
        part_name(2, 0, 1), part_name(2, 0, 4), part_name(4, 0, 1), part_name(5, 0, 1), theirs.name,
        "step-1.part-0000.notes",
    }  # fmt: skip


def test_the_next_part_takes_the_room_of_one_that_is_done_with(desk: Desk) -> None:
    for step in (1, 2, 3):
        desk.write(step)
    done_with = {(desk.store / part_name(step, 0, 1)).stat().st_ino for step in (1, 2)}
    desk.writer.retain([3])
    desk.write(4)

    assert (desk.store / part_name(4, 0, 1)).stat().st_ino in done_with
    assert read_part(desk.store / part_name(4, 0, 1)).meta.step == 4
    assert (desk.steps(), desk.hidden()) == ([3, 4], [])


def test_room_that_nothing_came_to_take_is_given_back(desk: Desk) -> None:
    for step in (1, 2):
        desk.write(step)
    desk.writer.retain([2])
    desk.writer.close()
    assert (desk.steps(), desk.hidden()) == ([2], [])


def test_a_write_that_fails_leaves_no_room_behind(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        desk.write(step)
    desk.writer.retain([2])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", _broken_disk)
        assert isinstance(desk.write(3)[1], StorageError)
    assert (desk.steps(), desk.hidden()) == ([2], [])
    assert desk.write(4)[1] is None
    assert read_part(desk.store / part_name(4, 0, 1)).meta.step == 4
    desk.writer.retain([4])
    desk.writer.close()
    assert (desk.steps(), desk.hidden()) == ([4], [])


def _broken_disk(*_: object) -> int:
    raise OSError(errno.EIO, "the disk is on fire")


def test_nothing_to_keep_deletes_nothing(desk: Desk) -> None:
    desk.write(1)
    desk.writer.retain([])
    desk.writer.close()

    assert desk.steps() == [1]


def test_a_failed_write_is_told_and_the_next_one_works(desk: Desk) -> None:
    desk.store.parent.mkdir(exist_ok=True)
    desk.store.write_text("in the way")
    written, error = desk.write(1)
    assert written is None
    assert isinstance(error, StorageError)
    desk.store.unlink()

    assert desk.write(2)[1] is None


def test_a_bug_is_told_too_and_does_not_end_the_thread(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot_writer, "write_part", broken)
        _, error = desk.write(1)
    assert isinstance(error, InternalError)
    assert "boom" in error.cause

    assert desk.write(2)[1] is None


def test_what_cannot_be_deleted_does_not_end_the_thread(desk: Desk) -> None:
    desk.write(5)
    (desk.store / part_name(1, 0, 1)).mkdir()  # unlink refuses a directory

    desk.writer.retain([5])

    assert desk.write(6)[1] is None
    assert desk.steps() == [1, 5, 6]


def test_a_store_that_cannot_be_listed_does_not_end_the_thread(desk: Desk) -> None:
    desk.write(5)
    around = desk.store / part_name(1, 0, 1)
    around.symlink_to(around)  # to look at it is an error, as a network's disk may have any

    desk.writer.retain([5])

    assert desk.write(6)[1] is None


def test_a_bug_while_tidying_does_not_end_the_thread(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot_writer, "open_store", broken)
        desk.writer.retain([5])
        assert desk.write(6)[1] is None
    assert desk.write(7)[1] is None


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path) -> None:
    ours, theirs = tmp_path / f".{part_name(1, 0, 1)}.writing", tmp_path / f".{part_name(1, 1, 1)}.writing"
    for path in (ours, theirs):
        path.write_bytes(b"half")

    SnapshotWriter(tmp_path, 0, lambda _: None, every_steps=1).close()

    assert os.listdir(tmp_path) == [theirs.name]


def test_closing_finishes_what_is_begun(desk: Desk) -> None:
    meta = PartMeta(job="job", step=9, generation=1, partition=0, num_partitions=1, update_counts=(0,))
    desk.writer.write(meta, LAYOUT, Held({}), lambda *_: None)
    desk.writer.close()

    assert desk.steps() == [9]


# ---- a store that is slower than snapshots come ----


class SlowStore:
    """Holds every write until it is let go; `wrote` has the steps in the order in which they were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: Queue[int] = Queue()
        self.let_go: Queue[None] = Queue()
        self.wrote: list[int] = []
        real = snapshot_writer.write_part

        def slowly(location: Any, meta: PartMeta, *rest: Any) -> Written:
            self.wrote.append(meta.step)
            self.begun.put(meta.step)
            self.let_go.get(timeout=DEADLINE_S)
            return real(location, meta, *rest)

        monkeypatch.setattr(snapshot_writer, "write_part", slowly)


def ask(desk: Desk, step: int, *, generation: int = 1, last: bool = False) -> None:
    """Ask for a snapshot, and do not wait for it."""
    meta = PartMeta(job="job", step=step, generation=generation, partition=0, num_partitions=1, update_counts=(0,))
    desk.writer.write(
        meta, LAYOUT, Held({(0, "values"): bytes(64)}), lambda *reported: desk.received.append(reported), last=last
    )


def finish(desk: Desk, slow: SlowStore, num_asked: int) -> None:
    """Let every write go, until each snapshot that was asked for has been told of."""
    while len(desk.received) < num_asked:
        slow.let_go.put(None)
        desk.posted.get(timeout=DEADLINE_S)()


def left_out(desk: Desk) -> list[str]:
    return [error.cause.split(" is left out")[0] for _, error in desk.received if error is not None]


def test_a_slow_store_holds_nobody_back_and_what_is_left_out_is_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowStore(monkeypatch)
    ask(desk, 1)
    assert slow.begun.get(timeout=DEADLINE_S) == 1
    for step in (2, 3, 4, 5, 6, 7):  # none of these blocks: nothing is let go before all are asked for
        ask(desk, step)
    desk.writer.retain([2])
    finish(desk, slow, 7)

    assert slow.wrote == [1, 4]
    assert sorted(left_out(desk)) == [f"the snapshot of step {step}" for step in (2, 3, 5, 6, 7)]
    assert all(isinstance(error, StorageError) for _, error in desk.received if error)


def test_the_last_snapshot_gives_way_to_none(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowStore(monkeypatch)
    ask(desk, 1)
    slow.begun.get(timeout=DEADLINE_S)
    ask(desk, 8)
    ask(desk, 9, last=True)
    finish(desk, slow, 3)
    assert slow.wrote == [1, 9]


def test_what_going_back_has_made_void_gives_way(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowStore(monkeypatch)
    ask(desk, 1)
    slow.begun.get(timeout=DEADLINE_S)
    ask(desk, 8)
    ask(desk, 3, generation=2)
    finish(desk, slow, 3)
    assert slow.wrote == [1, 3]


def test_no_part_is_written_while_another_is_being_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: Queue[Any] = Queue()
    writer = SnapshotWriter(tmp_path / "store", 0, posted.put, every_steps=1, copied=True)
    desk, slow = Desk(tmp_path / "store", writer, posted), SlowStore(monkeypatch)
    ask(desk, 1)
    finish(desk, slow, 1)
    assert slow.begun.get(timeout=DEADLINE_S) == 1
    for step in (2, 3, 4, 5):
        ask(desk, step)
    for _ in (2, 3, 5):  # left out: the place is 4's
        desk.posted.get(timeout=DEADLINE_S)()
    writer.retain([1])
    writer.settled(part_name(8, 0, 1))  # of an earlier process
    assert slow.wrote == [1]
    writer.settled(part_name(1, 0, 1))
    finish(desk, slow, 5)
    assert slow.wrote == [1, 4]
    ask(desk, 6)
    slow.let_go.put(None)
    writer.close()
    assert slow.wrote == [1, 4, 6], "who ends does not wait for another node"


@given(
    every=st.integers(1, 50), writes=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 64)), min_size=2, max_size=4)
)
def test_partitions_with_slow_stores_agree_on_every_so_manyth_snapshot(
    every: int, writes: list[tuple[int, int]]
) -> None:
    """Each partition's store takes `length` quarters of an interval for a write, and is busy for `phase` at first."""
    longest = max(length for _, length in writes) / 4
    period = 1
    while period < longest:
        period *= 2
    written = [_written_by(every, phase / 4, length / 4, 8 * period) for phase, length in writes]
    common = set.intersection(*written)
    first = 32  # the first busy time is over
    assert {every * number for number in range(first, 7 * period, period) if number % period == 0} <= common


def _written_by(every: int, busy_until: float, length: float, num_snapshots: int) -> set[int]:
    """The steps that one partition writes, snapshots coming at times 0, 1, 2, ...; by `roundness` alone."""
    written: set[int] = set()
    waiting: int | None = None
    for number in range(num_snapshots):
        while waiting is not None and busy_until < number:
            written.add(waiting * every)
            busy_until, waiting = max(busy_until, waiting) + length, None
        rank = (roundness(number * every, every), number)
        if waiting is None or rank >= (roundness(waiting * every, every), waiting):
            waiting = number
    return written


def test_roundness_counts_twos_on_the_grid_and_nothing_beside_it() -> None:
    assert [roundness(step, 5) for step in (5, 10, 15, 20, 40, 7)] == [0, 1, 0, 2, 3, -1]
    assert roundness(0, 5) == ALWAYS


def test_a_store_that_shows_nobody_elses_files_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_writer, "SHARING_PATIENCE_S", 0.0)
    warnings: list[PsError] = []
    posted: Queue[Any] = Queue()
    writer = SnapshotWriter(
        tmp_path,
        0,
        posted.put,
        every_steps=1,
        shared_store_check=snapshot_writer.SharedStoreCheck(0, 3),
        warn=warnings.append,
    )
    (tmp_path / part_name(4, 1, 1)).touch()
    writer.retain([4])
    posted.get(timeout=DEADLINE_S)()
    (warning,) = warnings
    assert warning.cause.startswith(f"{tmp_path} shows nothing that partition-2 wrote there")
    writer.retain([4, 8])
    writer.close()
    assert posted.empty()


def test_files_that_are_seen_late_are_no_reason_to_warn() -> None:
    held = snapshot_writer.SharedStoreCheck(1, 3)
    assert held.check("/store", {1}, 0.0) is None
    assert held.check("/store", {1}, snapshot_writer.SHARING_PATIENCE_S - 1) is None
    assert held.check("/store", {0, 1, 2}, snapshot_writer.SHARING_PATIENCE_S + 1) is None
    assert held.check("/store", {1, 2}, 1000.0) is None
    assert held.check("/store", {1, 2}, 1000.0 + snapshot_writer.SHARING_PATIENCE_S) is not None
    assert held.check("/store", {1, 2}, 3000.0) is None, "told once"
    assert snapshot_writer.SharedStoreCheck(0, 1).check("/store", {0}, 5000.0) is None
