"""Memory shared by two processes: what may be mapped, what is seen through windows, who may write where."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pscluster.errors import FrameError
from pscluster.wire.memory import PAGE_BYTES, Arena, Lanes, Segment, lanes_bytes, page_offsets


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def shared(segment: Segment, *, writable: bool = False) -> Segment:
    """The segment as another process has it."""
    return Segment.open(os.dup(segment.fd), len(segment.view), writable=writable)


# ---- segments ----


@pytest.mark.parametrize("writable_by_others", [False, True])
def test_what_one_side_writes_the_other_reads(writable_by_others: bool) -> None:
    mine = Segment.create(3 * PAGE_BYTES, writable_by_others=writable_by_others)
    other = shared(mine)
    assert not any(other.view)
    mine.view[PAGE_BYTES : PAGE_BYTES + 5] = b"hello"

    assert bytes(other.view[PAGE_BYTES : PAGE_BYTES + 5]) == b"hello"
    assert len(mine.view) == len(other.view) == 3 * PAGE_BYTES


def test_a_segment_is_at_least_a_page() -> None:
    assert len(Segment.create(0, writable_by_others=True).view) == PAGE_BYTES


def test_the_maker_decides_who_may_write() -> None:
    closed = Segment.create(PAGE_BYTES, writable_by_others=False)
    before = num_descriptors()
    with pytest.raises(FrameError, match="cannot be mapped"):
        shared(closed, writable=True)
    with pytest.raises(TypeError, match="read-only"):
        shared(closed).view[0] = 1
    with pytest.raises(PermissionError):
        os.pwrite(closed.fd, b"x", 0)
    assert num_descriptors() == before
    closed.view[0] = 7
    assert closed.view[0] == 7, "its maker may"

    opened = Segment.create(PAGE_BYTES, writable_by_others=True)
    shared(opened, writable=True).view[0] = 1
    assert opened.view[0] == 1


@pytest.mark.parametrize("writable_by_others", [False, True])
def test_nobody_can_make_a_segment_smaller_or_undo_its_seals(writable_by_others: bool) -> None:
    segment = Segment.create(2 * PAGE_BYTES, writable_by_others=writable_by_others)
    for size in (0, PAGE_BYTES, 3 * PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def _memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * PAGE_BYTES)
        return os.dup(file.fileno())


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


FIXED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
FOREIGN: dict[str, Callable[[], int]] = {
    "too small": lambda: _memfd(2 * PAGE_BYTES - 1, FIXED),
    "empty": lambda: _memfd(0, FIXED),
    "not sealed": lambda: _memfd(2 * PAGE_BYTES, 0),
    "may shrink": lambda: _memfd(2 * PAGE_BYTES, fcntl.F_SEAL_GROW),
    "too big to map": lambda: _memfd(2**62, FIXED),
    "a file": _file,
    "a pipe": _pipe,
    "a device": lambda: os.open("/dev/null", os.O_RDWR),
    "a directory": lambda: os.open("/", os.O_RDONLY),
    "a socket": lambda: socket.socket().detach(),
    "an event": lambda: os.eventfd(0),
}


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_segment_is_refused_and_its_descriptor_closed(name: str, writable: bool) -> None:
    fd = FOREIGN[name]()
    with pytest.raises(FrameError, match="shared memory"):
        Segment.open(fd, 2 * PAGE_BYTES, writable=writable)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_segment_that_is_longer_than_promised_is_mapped_whole() -> None:
    assert len(Segment.open(_memfd(3 * PAGE_BYTES, FIXED), 5, writable=False).view) == 3 * PAGE_BYTES


def test_a_segment_outlives_its_maker_while_somebody_maps_it() -> None:
    mine = Segment.create(PAGE_BYTES, writable_by_others=False)
    other = shared(mine)
    mine.view[:4] = b"left"
    del mine

    assert bytes(other.view[:4]) == b"left"


def test_a_view_outlives_its_segment() -> None:
    segment = Segment.create(PAGE_BYTES, writable_by_others=True)
    view = segment.view[:4]
    del segment
    view[:] = b"kept"

    assert bytes(view) == b"kept"


def test_nothing_is_left_of_a_thousand_segments() -> None:
    gc.collect()
    descriptors, mappings = num_descriptors(), num_mappings()
    for _ in range(1000):
        lanes = Lanes.create([PAGE_BYTES, 100], 3)
        other = Lanes.open(os.dup(lanes.fd), [PAGE_BYTES, 100], 3)
        arena = Arena(PAGE_BYTES)
        segment = Segment.create(PAGE_BYTES, writable_by_others=False)
        arena.show(0, segment, 0, PAGE_BYTES)
        other.place(0, 1)[0] = arena.view[0] + 1
    del lanes, other, arena, segment

    assert num_descriptors() == descriptors
    assert num_mappings() <= mappings + 2, "the allocator may have grown"


# ---- arenas ----


def test_a_window_shows_what_the_other_side_writes_and_then_writes_later() -> None:
    segment, arena = Segment.create(4 * PAGE_BYTES, writable_by_others=False), Arena(3 * PAGE_BYTES)
    arena.view[:] = b"a" * len(arena.view)
    arena.show(PAGE_BYTES, segment, 2 * PAGE_BYTES, PAGE_BYTES)

    assert bytes(arena.view[PAGE_BYTES : 2 * PAGE_BYTES]) == bytes(PAGE_BYTES)
    segment.view[2 * PAGE_BYTES : 2 * PAGE_BYTES + 3] = b"new"
    assert bytes(arena.view[PAGE_BYTES : PAGE_BYTES + 3]) == b"new"
    assert set(arena.view[:PAGE_BYTES]) == set(arena.view[2 * PAGE_BYTES :]) == {ord("a")}, "the rest is untouched"


def test_private_again_a_page_is_zeroed_and_shows_nothing_any_more() -> None:
    segment, arena = Segment.create(2 * PAGE_BYTES, writable_by_others=False), Arena(2 * PAGE_BYTES)
    segment.view[:] = b"s" * len(segment.view)
    arena.show(0, segment, 0, 2 * PAGE_BYTES)
    arena.make_private(0, PAGE_BYTES)

    assert not any(arena.view[:PAGE_BYTES])
    assert set(arena.view[PAGE_BYTES:]) == {ord("s")}
    arena.view[0] = 1
    assert segment.view[0] == ord("s")


def test_a_window_needs_the_segment_no_more_once_it_is_there() -> None:
    segment, arena = Segment.create(PAGE_BYTES, writable_by_others=False), Arena(PAGE_BYTES)
    segment.view[:4] = b"left"
    arena.show(0, segment, 0, PAGE_BYTES)
    del segment

    assert bytes(arena.view[:4]) == b"left"


def test_part_of_a_page_takes_the_whole_page_along() -> None:
    segment, arena = Segment.create(2 * PAGE_BYTES, writable_by_others=False), Arena(2 * PAGE_BYTES)
    segment.view[:] = b"s" * len(segment.view)
    arena.show(0, segment, 0, 10)

    assert set(arena.view[:PAGE_BYTES]) == {ord("s")} and not any(arena.view[PAGE_BYTES:])


@pytest.mark.parametrize(
    ("offset", "segment_offset", "size"),
    [(1, 0, 1), (0, 1, 1), (-PAGE_BYTES, 0, 1), (PAGE_BYTES, 0, PAGE_BYTES + 1), (2 * PAGE_BYTES, 0, 1)],
)
def test_a_window_beside_the_arena_or_the_pages_is_our_own_mistake(offset: int, segment_offset: int, size: int) -> None:
    segment, arena = Segment.create(2 * PAGE_BYTES, writable_by_others=False), Arena(2 * PAGE_BYTES)
    with pytest.raises(AssertionError):
        arena.show(offset, segment, segment_offset, size)
    assert not any(arena.view)


def test_a_window_onto_nothing_is_none() -> None:
    """A partition of a small model may hold no word of it."""
    arena, segment = Arena(PAGE_BYTES), Segment.create(0, writable_by_others=False)
    arena.view[:1] = b"x"
    arena.show(0, segment, 0, 0)

    assert arena.view[:1] == b"x"


def test_a_write_to_a_window_ends_the_process_and_changes_nothing() -> None:
    """Nobody can do it unnoticed."""
    segment = Segment.create(PAGE_BYTES, writable_by_others=False)
    code = (
        "import resource, sys; from pscluster.wire.memory import *\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "a, s = Arena(1), Segment.open(int(sys.argv[1]), 1, writable=False)\n"
        "a.show(0, s, 0, 1); a.view[0] = 1"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(segment.fd)], pass_fds=[segment.fd], check=False)

    assert ended.returncode == -11
    assert segment.view[0] == 0


@given(pages=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 3)), max_size=12))
def test_whatever_is_shown_where_every_page_is_what_was_put_there_last(pages: list[tuple[int, int, int]]) -> None:
    """(page of the arena, page of the segment, how many); odd sums make pages private instead."""
    segment, arena = Segment.create(10 * PAGE_BYTES, writable_by_others=False), Arena(10 * PAGE_BYTES)
    for page in range(10):
        segment.view[page * PAGE_BYTES] = 100 + page
    address = arena._address
    model = [0] * 10
    for at, source, count in pages:
        if (at + source + count) % 2:
            arena.make_private(at * PAGE_BYTES, count * PAGE_BYTES)
            model[at : at + count] = [0] * count
        else:
            arena.show(at * PAGE_BYTES, segment, source * PAGE_BYTES, count * PAGE_BYTES)
            model[at : at + count] = [100 + source + i for i in range(count)]
    assert [arena.view[page * PAGE_BYTES] for page in range(10)] == model
    assert arena._address == address


# ---- places ----


@given(sizes=st.lists(st.integers(0, 3 * PAGE_BYTES), max_size=12))
def test_things_on_pages_of_their_own_do_not_meet(sizes: list[int]) -> None:
    offsets, end = page_offsets(sizes)

    assert len(offsets) == len(sizes)
    assert all(offset % PAGE_BYTES == 0 for offset in (*offsets, end))
    assert [*offsets, end][0] == 0
    for offset, size, after in zip(offsets, sizes, [*offsets, end][1:], strict=True):
        assert offset + size <= after < offset + size + PAGE_BYTES
    assert mmap.PAGESIZE == PAGE_BYTES


@given(sizes=st.lists(st.integers(0, 2 * PAGE_BYTES), min_size=1, max_size=6), num_lanes=st.integers(1, 4))
def test_both_sides_find_each_place_at_the_same_spot_and_none_meets_another(sizes: list[int], num_lanes: int) -> None:
    partition = Lanes.create(sizes, num_lanes)
    trainer = Lanes.open(os.dup(partition.fd), sizes, num_lanes)
    places = [(bucket, lane) for bucket in range(len(sizes)) for lane in range(num_lanes)]
    for number, (bucket, lane) in enumerate(places):
        trainer.place(bucket, lane)[:] = bytes([number + 1]) * sizes[bucket]

    for number, (bucket, lane) in enumerate(places):
        assert bytes(partition.place(bucket, lane)) == bytes([number + 1]) * sizes[bucket]
    assert [trainer.take(bucket) for bucket in range(len(sizes))] == [0] * len(sizes), "no place lies on the marks"
    assert len(trainer.view) == max(lanes_bytes(sizes, num_lanes), PAGE_BYTES)


@pytest.mark.parametrize(("sizes", "num_lanes"), [([PAGE_BYTES], 2), ([PAGE_BYTES + 1], 1), ([1, 1], 1)])
def test_lanes_of_another_layout_are_refused(sizes: list[int], num_lanes: int) -> None:
    made = Lanes.create([PAGE_BYTES], 1)
    fd = os.dup(made.fd)
    with pytest.raises(FrameError, match="promised"):
        Lanes.open(fd, sizes, num_lanes)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class LanesAgainstAModel(RuleBasedStateMachine):
    """A trainer takes and writes, a partition reads, sums in place and gives back, in any order."""

    SIZES = (1, 5, PAGE_BYTES + 1)

    @initialize(num_lanes=st.integers(1, 3))
    def begin(self, num_lanes: int) -> None:
        self.partition = Lanes.create(self.SIZES, num_lanes)
        self.trainer = Lanes.open(os.dup(self.partition.fd), self.SIZES, num_lanes)
        self.num_lanes = num_lanes
        self.taken: dict[tuple[int, int], int] = {}  # place -> the byte that it is full of

    @rule(bucket=st.integers(0, 2), byte=st.integers(1, 100))
    def take_and_write(self, bucket: int, byte: int) -> None:
        lane = self.trainer.take(bucket)
        free = [n for n in range(self.num_lanes) if (bucket, n) not in self.taken]
        assert lane == (free[0] if free else None), "the lowest that is free"
        if lane is not None:
            self.trainer.place(bucket, lane)[:] = bytes([byte]) * self.SIZES[bucket]
            self.taken[bucket, lane] = byte

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        bucket, lane = data.draw(st.sampled_from(sorted(self.taken)))
        place = self.partition.place(bucket, lane)
        place[:] = bytes(value + 1 for value in place)
        self.taken[bucket, lane] += 1

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), by_trainer=st.booleans())
    def give_back(self, data: st.DataObject, by_trainer: bool) -> None:
        bucket, lane = data.draw(st.sampled_from(sorted(self.taken)))
        (self.trainer if by_trainer else self.partition).give_back(bucket, lane)
        del self.taken[bucket, lane]

    @invariant()
    def every_place_in_use_holds_what_was_put_there(self) -> None:
        for (bucket, lane), byte in getattr(self, "taken", {}).items():
            for side in (self.partition, self.trainer):
                assert set(side.place(bucket, lane)) == {byte}


TestLanesAgainstAModel = LanesAgainstAModel.TestCase
TestLanesAgainstAModel.settings = settings(max_examples=40)
