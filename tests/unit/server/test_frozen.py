"""Snapshots are written from the memory of the partition: what is overwritten meanwhile is copied, and nothing else."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from pscluster.step.layout import Layout, TensorSpec
from pscluster.storage import Buffer, direct
from pscluster.storage.snapshot import PartMeta, PieceKey, read_part, write_part
from psserver.partition.checkpoint import frozen
from psserver.partition.checkpoint.frozen import Frozen
from psserver.partition.step.state import huge_page_memory

KEYS: list[PieceKey] = [(0, "values"), (0, "moment0"), (1, "values"), (1, "moment0")]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "CHUNK_BYTES", 1000)


@pytest.fixture
def memory() -> dict[PieceKey, bytearray]:
    draw = random.Random(3)
    return {key: bytearray(draw.randbytes(size)) for key, size in zip(KEYS, (5_500, 5_500, 999, 1_000), strict=True)}


@pytest.fixture
def before(memory: dict[PieceKey, bytearray]) -> dict[PieceKey, bytes]:
    return {key: bytes(place) for key, place in memory.items()}


def made(memory: Mapping[PieceKey, bytearray | memoryview]) -> Frozen:
    return Frozen({key: memoryview(place) for key, place in memory.items()})


def overwrite(memory: dict[PieceKey, bytearray], bucket: int) -> None:
    for key, place in memory.items():
        if key[0] == bucket:
            place[:] = bytes(len(place))


def read(held: Frozen, key: PieceKey) -> bytes:
    return b"".join(chunk.read(bytes) for chunk in held.chunks(key))


def test_what_is_not_overwritten_is_not_copied(
    memory: dict[PieceKey, bytearray], before: dict[PieceKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "_copied", lambda source: pytest.fail(f"{source.nbytes} bytes were copied"))
    held = made(memory)
    assert held.sizes() == {key: len(data) for key, data in before.items()}
    assert [read(held, key) for key in KEYS] == [before[key] for key in KEYS]
    assert held.is_over
    held.preserve_all()


def test_what_is_overwritten_in_the_middle_of_a_piece_was_copied(
    memory: dict[PieceKey, bytearray], before: dict[PieceKey, bytes]
) -> None:
    held = made(memory)
    chunks = held.chunks((0, "values"))
    got = next(chunks).read(bytes) + next(chunks).read(bytes)
    held.preserve(0)
    overwrite(memory, 0)
    got += b"".join(chunk.read(bytes) for chunk in chunks)
    assert got == before[(0, "values")]
    assert [read(held, key) for key in KEYS[1:]] == [before[key] for key in KEYS[1:]]


def test_what_is_overwritten_while_it_is_read_is_read_again(
    memory: dict[PieceKey, bytearray], before: dict[PieceKey, bytes]
) -> None:
    held = made(memory)
    tries: list[bytes] = []

    def slowly(data: Buffer) -> bytes:
        if not tries:
            held.preserve(0)
            overwrite(memory, 0)
        tries.append(bytes(data))
        return tries[-1]

    first = next(held.chunks((0, "values"))).read(slowly)
    assert first == before[(0, "values")][:1_000]
    assert tries == [bytes(1_000), first]


def test_only_a_bucket_that_still_waits_is_copied(
    memory: dict[PieceKey, bytearray], before: dict[PieceKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    copy = frozen._copied
    monkeypatch.setattr(frozen, "_copied", lambda source: copied.append(source.nbytes) or copy(source))
    held = made(memory)
    read(held, (0, "values"))
    for _ in range(2):
        held.preserve(0)
    assert copied == [5_500], "its values are written; and once is enough"
    held.preserve_all()
    assert copied == [5_500, 999, 1_000]
    for bucket in (0, 1):
        overwrite(memory, bucket)
    assert [read(held, key) for key in KEYS[1:]] == [before[key] for key in KEYS[1:]]


def test_what_was_not_overwritten_is_read_from_where_it_lies(memory: dict[PieceKey, bytearray]) -> None:
    begin = _address(memory[(0, "values")])
    for preserved in (False, True):
        held = made(memory)
        if preserved:
            held.preserve_all()
        places = [_address(chunk.memory) for chunk in held.chunks((0, "values"))]
        assert [place - places[0] for place in places] == [0, 1_000, 2_000, 3_000, 4_000, 5_000]
        assert (places[0] != begin) == preserved


def _address(memory: bytearray | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_what_is_given_up_is_not_copied(memory: dict[PieceKey, bytearray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_copied", lambda _: pytest.fail("nobody wants it"))
    held = made(memory)
    for _ in range(2):
        held.end()
    assert held.is_over
    held.preserve_all()


def test_the_two_threads_never_see_half_a_piece() -> None:
    """The partition makes versions as fast as it can; each snapshot is of one of them."""
    memory = {(bucket, "values"): bytearray(64_000) for bucket in range(4)}
    waiting: list[Frozen | None] = [None]
    seen: list[set[bytes]] = []

    def write() -> None:
        while len(seen) < 40:
            if (held := waiting[0]) is not None:
                seen.append({bytes([byte]) for key in memory for byte in set(read(held, key))})
                waiting[0] = None

    writing = threading.Thread(target=write)
    writing.start()
    held: Frozen | None = None
    version = 0
    while writing.is_alive():
        if waiting[0] is None:
            held = waiting[0] = made(memory)
        for bucket in range(4):
            held.preserve(bucket) if held is not None else None
            memory[(bucket, "values")][:] = bytes([version % 250]) * 64_000
        version += 1
    assert all(len(bytes_) == 1 for bytes_ in seen), "the bytes of two versions in one snapshot"
    assert version > 40


@pytest.mark.parametrize("struck", range(6))
def test_a_file_is_of_one_version_whatever_the_disk_is_at_work_on(
    struck: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of one of its writes the partition makes the next version, under the disk's hands."""
    monkeypatch.setattr(frozen, "CHUNK_BYTES", 2 << 20)
    keys: list[PieceKey] = [(bucket, what) for bucket in range(2) for what in ("values", "moment0")]
    memory = {key: huge_page_memory((3 << 20) + 12) for key in keys}
    before = {key: random.Random(str(key)).randbytes(len(place)) for key, place in memory.items()}
    for key, place in memory.items():
        place[:] = before[key]
    held = made(memory)
    writes: list[int] = []
    plain = os.pwritev

    def pwritev(descriptor: int, data: list[memoryview], at: int) -> int:
        writes.append(at)
        if len(writes) - 1 != struck:
            return plain(descriptor, data, at)
        written = plain(descriptor, [*data[:-1], data[-1][: len(data[-1]) // 2]], at)
        held.preserve_all()
        for place in memory.values():
            place[:] = bytes(len(place))
        return written

    monkeypatch.setattr(direct.os, "pwritev", pwritev)
    layout = Layout((TensorSpec(names=("w",), shape=(5,), dtype="float32", kind="trained"),))
    meta = PartMeta(job="job-a", step=1, generation=1, partition=0, num_partitions=1, update_counts=(1,))
    write_part(tmp_path / "part", meta, layout, held)  # with checksums, which are compared when it is read
    assert read_part(tmp_path / "part").pieces == before
    assert len(writes) > struck
    assert held.is_over


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_private_memory_is_fresh_and_of_that_size(size: int) -> None:
    memory = huge_page_memory(size)
    assert memory.nbytes == size and not any(memory[:100])
    memory[:] = bytes(size)
    if size:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert address % (4096 if size < 2 << 20 else 2 << 20) == 0
