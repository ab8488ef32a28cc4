"""Files written past the page cache are files like others, on every file system."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.storage import direct
from pscluster.storage.direct import ALIGNMENT, DirectFile

BLOCK = 1 << 20
SIZES = st.lists(
    st.tuples(st.sampled_from([0, 1, 511, 4095, 4096, 4097, 100_000, BLOCK - 1, BLOCK]), st.booleans()), max_size=5
)


def on_a_page(data: bytes) -> memoryview:
    """A copy that begins with a page."""
    memory = memoryview(mmap.mmap(-1, max(len(data), 1)))[: len(data)]
    memory[:] = data
    return memory


def write(path: Path, parts: list[Any]) -> bytes:
    file = DirectFile(path)
    try:
        for part in parts:
            file.write(memoryview(part))
        file.flush()
    finally:
        file.close()
        file.close()
    return path.read_bytes()


@given(sizes=SIZES)
def test_what_is_written_is_there(sizes: list[tuple[int, bool]], tmp_path_factory: pytest.TempPathFactory) -> None:
    draw = random.Random(1)
    parts = [(draw.randbytes(size), aligned) for size, aligned in sizes]
    path = tmp_path_factory.getbasetemp() / "direct"
    path.write_bytes(b"an older and longer file" * 1000)
    signals = [on_a_page(data) if aligned else data for data, aligned in parts]
    assert write(path, signals) == b"".join(data for data, _ in parts)


@given(sizes=SIZES, again=st.sets(st.integers(0, 4)))
def test_what_was_written_last_can_be_written_again(
    sizes: list[tuple[int, bool]], again: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = random.Random(2)
    path = tmp_path_factory.getbasetemp() / "direct"
    right = [draw.randbytes(size) for size, _ in sizes]
    file = DirectFile(path)
    try:
        for number, (data, (size, aligned)) in enumerate(zip(right, sizes, strict=True)):
            wrong = bytes(size) if number in again else data
            file.write(on_a_page(wrong) if aligned else memoryview(wrong))
            if number in again:
                file.rewrite(on_a_page(data) if aligned else memoryview(data))
        file.flush()
    finally:
        file.close()
    assert path.read_bytes() == b"".join(right)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[list[memoryview]]:
    """What the file system was given, call by call."""
    seen: list[list[memoryview]] = []
    plain = os.pwritev

    def watched(descriptor: int, data: list[memoryview], at: int) -> int:
        seen.append(list(data))
        return plain(descriptor, data, at)

    monkeypatch.setattr(direct.os, "pwritev", watched)
    return seen


def as_given(writes: list[list[memoryview]], lies: memoryview) -> list[list[tuple[bool, int]]]:
    """For each call and each thing in it: whether it is from there where `lies` does, and its bytes."""
    return [[(data.obj is lies.obj, data.nbytes) for data in call] for call in writes]


def test_what_lies_on_pages_is_not_copied(tmp_path: Path, writes: list[list[memoryview]]) -> None:
    data = os.urandom(2 * BLOCK + 5)
    lies = on_a_page(data)
    assert write(tmp_path / "file", [lies]) == data
    assert as_given(writes, lies) == [[(True, 2 * BLOCK)], [(False, ALIGNMENT)]]


def test_small_things_go_with_the_large_one_after_them(tmp_path: Path, writes: list[list[memoryview]]) -> None:
    lies = on_a_page(bytes(BLOCK))
    assert write(tmp_path / "file", [b"abc", bytes(ALIGNMENT - 3), on_a_page(b"x" * ALIGNMENT), lies])[-1:] == b"\0"
    assert as_given(writes, lies) == [[(False, 2 * ALIGNMENT), (True, BLOCK)]]


@pytest.mark.parametrize("taken", [1, ALIGNMENT, 2 * ALIGNMENT, 2 * ALIGNMENT + 5, 3 * BLOCK])
def test_a_disk_may_take_less_than_it_was_given(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def some(descriptor: int, data: list[memoryview], at: int) -> int:
        calls.append(at)
        return os.pwrite(descriptor, b"".join(data)[:taken] if len(calls) < 50 else b"".join(data), at)

    monkeypatch.setattr(direct.os, "pwritev", some)
    parts = [os.urandom(2 * ALIGNMENT), on_a_page(os.urandom(2 * BLOCK)), os.urandom(7)]
    assert write(tmp_path / "file", parts) == b"".join(parts)
    assert len(calls) > 1


@pytest.mark.parametrize("where", ["open", "write"])
def test_a_file_system_that_does_not_take_it_gets_ordinary_writes(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    plain_open, plain_write = os.open, os.pwritev

    def opens(path: Path, flags: int, mode: int) -> int:
        if where == "open" and flags & os.O_DIRECT:
            refused.append(flags)
            raise OSError(errno.EINVAL, "no such writes here")
        return plain_open(path, flags, mode)

    def writes(descriptor: int, data: list[memoryview], at: int) -> int:
        if where == "write" and not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "another alignment, please")
        return plain_write(descriptor, data, at)

    monkeypatch.setattr(direct.os, "open", opens)
    monkeypatch.setattr(direct.os, "pwritev", writes)
    data = os.urandom(BLOCK + 5)
    assert write(tmp_path / "file", [data]) == data
    assert len(refused) == 1


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(_descriptor: int, _data: list[memoryview], _at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct.os, "pwritev", writes)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", [b"x"])


def test_only_a_directory_that_is_there_takes_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "nowhere" / "file")


def test_who_opens_a_file_as_it_is_taken_over_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup may come by at any time; the kernel's signal that tells of it would end a process."""
    recycled, met = tmp_path / "room", []
    recycled.write_bytes(b"old")
    plain = direct.fcntl.fcntl

    def fcntl(descriptor: int, command: int, argument: int = 0) -> int:
        result = plain(descriptor, command, argument)
        if (command, argument) == (direct.fcntl.F_SETLEASE, direct.fcntl.F_WRLCK):
            with pytest.raises(BlockingIOError):
                os.open(recycled, os.O_RDONLY | os.O_NONBLOCK)
            met.append("the lease")
        return result

    monkeypatch.setattr(direct.fcntl, "fcntl", fcntl)
    before = signal.signal(signal.SIGIO, lambda *_: met.append("the signal"))
    try:
        file = DirectFile(tmp_path / "new", recycled)
        file.write(memoryview(b"new and longer"))
        file.flush()
        file.close()
    finally:
        signal.signal(signal.SIGIO, before)
    assert (tmp_path / "new").read_bytes() == b"new and longer"
    assert met == ["the lease"] and not recycled.exists()


@pytest.mark.parametrize("broken", ["rename", "unlink", "lease", "another's"])
def test_room_that_cannot_be_had_costs_no_file(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recycled, failed = tmp_path / "room", []
    recycled.write_bytes(b"an old file")

    def refuse(*_: object, **__: object) -> int:
        failed.append(broken)
        raise OSError(errno.EACCES, "no")

    open_before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        if broken == "another's":
            patch.setattr(direct.os, "geteuid", lambda: failed.append(broken) or os.getuid() + 1)
        elif broken == "lease":
            patch.setattr(direct.fcntl, "F_WRLCK", -1)
            failed.append(broken)
        else:
            patch.setattr(Path, "rename", refuse)
            if broken == "unlink":
                patch.setattr(Path, "unlink", refuse)
        file = DirectFile(tmp_path / "new", recycled)
    assert failed and recycled.exists() == (broken == "unlink")
    file.write(memoryview(b"new"))
    file.flush()
    file.close()
    assert (tmp_path / "new").read_bytes() == b"new"
    assert len(os.listdir("/proc/self/fd")) == open_before
