"""The snapshot thread: writes, says so, deletes what is done with, and never dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from pscluster.errors import InternalError, PsError, StorageError
from pscluster.layout import Layout, TensorSpec
from pscluster.snapshot import PartMeta, Written, part_name, read_part, write_part
from psserver.partition import snapshots
from psserver.partition.snapshots import SnapshotWriter

LAYOUT = Layout((TensorSpec(names=("w",), shape=(4,), dtype="float32", kind="trained"),))
DEADLINE_S = 20.0


@dataclass
class Desk:
    """A writer, and what it posted to the partition's thread."""

    store: Path
    writer: SnapshotWriter
    posted: Queue[Any]
    heard: list[tuple[Written | None, PsError | None]] = field(default_factory=list)

    def write(self, step: int, *, generation: int = 1) -> tuple[Written | None, PsError | None]:
        meta = PartMeta(job="job", step=step, generation=generation, partition=0, num_partitions=1, ages=(0,))
        self.writer.write(meta, LAYOUT, {(0, "values"): bytes(64)}, lambda *told: self.heard.append(told))
        self.posted.get(timeout=DEADLINE_S)()
        return self.heard[-1]

    def steps(self) -> list[int]:
        return sorted(int(name.split(".")[0].removeprefix("step-")) for name in os.listdir(self.store))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    posted: Queue[Any] = Queue()
    made = Desk(tmp_path / "store", SnapshotWriter(tmp_path / "store", 0, posted.put), posted)
    yield made
    made.writer.close()


def test_a_part_is_written_and_told(desk: Desk) -> None:
    written, error = desk.write(3)

    assert error is None and written is not None
    assert written.path == desk.store / part_name(3, 0, 1)
    assert read_part(written.path).meta.step == 3


def test_only_older_parts_of_its_own_that_are_not_kept_are_deleted(desk: Desk) -> None:
    for step in (1, 2, 3, 4, 5):
        desk.write(step)
    desk.write(2, generation=4)
    other = PartMeta(job="job", step=1, generation=1, partition=1, num_partitions=2, ages=(0,))
    theirs = write_part(desk.store / part_name(1, 1, 1), other, LAYOUT, {}).path
    (desk.store / "step-1.part-0000.notes").write_text("not ours")

    desk.writer.retain([2, 4])
    desk.writer.close()

    left = set(os.listdir(desk.store))
    assert left == {
        part_name(2, 0, 1), part_name(2, 0, 4), part_name(4, 0, 1), part_name(5, 0, 1), theirs.name,
        "step-1.part-0000.notes",
    }  # fmt: skip


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
        patch.setattr(snapshots, "write_part", broken)
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


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path) -> None:
    ours, theirs = tmp_path / f".{part_name(1, 0, 1)}.writing", tmp_path / f".{part_name(1, 1, 1)}.writing"
    for path in (ours, theirs):
        path.write_bytes(b"half")

    SnapshotWriter(tmp_path, 0, lambda _: None).close()

    assert os.listdir(tmp_path) == [theirs.name]


def test_closing_finishes_what_is_begun(desk: Desk) -> None:
    meta = PartMeta(job="job", step=9, generation=1, partition=0, num_partitions=1, ages=(0,))
    desk.writer.write(meta, LAYOUT, {}, lambda *_: None)
    desk.writer.close()

    assert desk.steps() == [9]
