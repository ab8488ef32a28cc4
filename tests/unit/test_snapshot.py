"""Snapshot parts: whole and true, or refused by name; a full disk leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import crc32c
import pytest

from harness.held_pieces import write_part
from pscluster.errors import DamagedError, StorageError
from pscluster.step.layout import BUCKET_WORDS, Layout, TensorSpec
from pscluster.storage import Buffer, Written
from pscluster.storage.snapshot import PartMeta, PieceKey, part_name, read_part, read_parts

LAYOUT = Layout((TensorSpec(names=("w",), shape=(5,), dtype="float32", kind="trained"),))
META = PartMeta(job="job-a", step=7, generation=3, partition=0, num_partitions=1, update_counts=(7,))
PIECES: dict[PieceKey, Buffer] = {
    (0, "values"): bytes(range(64)),
    (0, "moment0"): bytearray(range(64, 128)),
    (0, "moment1"): memoryview(bytes(64)),
}


def written(path: Path) -> Written:
    return write_part(path, META, LAYOUT, PIECES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / part_name(7, 0, 3)


def test_a_part_reads_back_whole(path: Path) -> None:
    result = written(path)

    part = read_part(path)

    assert (part.meta, part.layout) == (META, LAYOUT)
    assert {key: bytes(data) for key, data in part.pieces.items()} == {k: bytes(v) for k, v in PIECES.items()}
    data = path.read_bytes()
    assert result == Written(name=path.name, size_bytes=len(data), checksum=f"crc32c:{crc32c.crc32c(data):08x}")
    assert os.listdir(path.parent) == [path.name], "the temporary file is gone"


def test_a_part_is_never_garbage_wherever_it_is_cut(path: Path) -> None:
    written(path)
    data = path.read_bytes()
    for length in range(len(data)):
        os.truncate(path, length) if length else path.write_bytes(b"")
        with pytest.raises(DamagedError, match=path.name):
            read_part(path)
        path.write_bytes(data)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_part_is_never_garbage_whichever_byte_changed(path: Path, flip: int) -> None:
    written(path)
    data = path.read_bytes()
    for offset in range(len(data)):
        changed = bytearray(data)
        changed[offset] ^= flip
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match=path.name):
            read_part(path)


def test_what_follows_the_last_piece_is_refused(path: Path) -> None:
    written(path)
    path.write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(StorageError, match=r"\+1 bytes"):
        read_part(path)


def _with_header(**fields: object) -> bytes:
    header = json.dumps(fields).encode()
    checksum = crc32c.crc32c(header).to_bytes(4, "little")
    return b"PSSNAP02" + len(header).to_bytes(4, "little") + header + checksum


@pytest.mark.parametrize(
    "data",
    [
        b"PSSNAP03" + bytes(100),
        b"PSSNAP02" + b"\xff" * 100,
        _with_header(),
        _with_header(meta={"update_counts": []}, layout=LAYOUT.to_json().decode(), pieces=[]),
        _with_header(meta=[], layout="{}", pieces=[]),
        _with_header(meta=META.__dict__ | {"update_counts": [7]}, layout="{}", pieces=[]),
        _with_header(meta=META.__dict__, layout=3, pieces=[]),
        _with_header(
            meta=META.__dict__,
            layout=LAYOUT.to_json().decode(),
            pieces=[{"bucket": 0, "what": "values", "size_bytes": -1}],
        ),
        _with_header(
            meta=META.__dict__,
            layout=LAYOUT.to_json().decode(),
            pieces=[{"bucket": 0, "what": "values", "size_bytes": 1 << 50}],
        ),
    ],
    ids=["magic", "huge header", "empty", "no meta", "list", "layout", "layout type", "negative", "huge piece"],
)
def test_a_header_that_lies_with_a_fitting_checksum_is_refused(path: Path, data: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(data)

    with pytest.raises(StorageError, match=path.name):
        read_part(path)


def test_a_part_that_is_gone_is_damage_and_a_store_that_is_away_is_not(path: Path) -> None:
    with pytest.raises(StorageError, match=f"{path.name}.*there is no directory") as away:
        read_part(path)
    assert not isinstance(away.value, DamagedError), "an unmounted disk voids no snapshot"

    path.parent.mkdir()
    with pytest.raises(DamagedError, match=f"{path.name} is gone"):
        read_part(path)


# ---- what cannot be written ----


def test_a_store_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match=r"file/store/x.*File exists"):
        written(tmp_path / "file" / "store" / "x")


def test_a_name_taken_by_a_directory_leaves_no_temporary_file(path: Path) -> None:
    path.mkdir(parents=True)

    with pytest.raises(StorageError, match=path.name):
        written(path)

    assert os.listdir(path.parent) == [path.name]


def test_a_part_written_again_replaces_the_old_one_whole(path: Path) -> None:
    written(path)
    write_part(path, replace(META, step=8), LAYOUT, PIECES)

    assert read_part(path).meta.step == 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_named_and_leaves_no_temporary_file(small_disk: Path) -> None:
    kept = small_disk / part_name(5, 0, 1)
    written(kept)
    path = small_disk / part_name(7, 0, 3)

    with pytest.raises(StorageError, match=f"{path.name}.*No space left") as refused:
        write_part(path, META, LAYOUT, {(0, "values"): bytes(1 << 17)})

    assert "free space" in refused.value.action
    assert os.listdir(small_disk) == [kept.name]
    assert read_part(kept).meta == META
    written(path)  # there is room for a small one


# ---- all parts together ----


BIG = Layout(
    (
        TensorSpec(names=("w",), shape=(BUCKET_WORDS,), dtype="float32", kind="trained"),
        TensorSpec(names=("n",), shape=(3,), dtype="int64", kind="carried"),
    )
)


def parts_of(layout: Layout, num_partitions: int, directory: Path) -> tuple[list[bytes], list[Path]]:
    """A snapshot of random words in as many parts; the words and the files."""
    words = [os.urandom(4 * bucket.num_words) for bucket in layout.buckets]
    paths = []
    for partition in range(num_partitions):
        pieces: dict[PieceKey, Buffer] = {
            (s.bucket, "values"): words[s.bucket][4 * s.start : 4 * s.stop]
            for s in layout.spans(partition, num_partitions)
            if s.num_words
        }
        meta = replace(META, partition=partition, num_partitions=num_partitions, update_counts=(1, 1))
        paths.append(directory / part_name(7, partition, 3))
        write_part(paths[-1], meta, layout, pieces)
    return words, paths


@pytest.mark.parametrize("num_partitions", [1, 2, 3])
def test_the_parts_of_a_snapshot_make_the_whole_model(num_partitions: int, tmp_path: Path) -> None:
    words, paths = parts_of(BIG, num_partitions, tmp_path)

    layout, read = read_parts(paths[::-1])

    assert layout == BIG
    assert [bytes(data) for data in read] == words


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    _, paths = parts_of(LAYOUT, 2, tmp_path)
    with pytest.raises(StorageError, match=r"needs parts 0 to 1; there are \[1\]"):
        read_parts(paths[1:])
    with pytest.raises(StorageError, match=r"there are \[0, 0\]"):
        read_parts([paths[0], paths[0]])
    with pytest.raises(StorageError, match="without parts"):
        read_parts([])
    other = tmp_path / "other"
    write_part(other, replace(META, step=8, partition=1, num_partitions=2), LAYOUT, {})
    with pytest.raises(StorageError, match="not of one step"):
        read_parts([paths[0], other])


def test_a_part_without_the_pieces_of_its_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_part(path, META, LAYOUT, {(0, "values"): bytes(8)})
    with pytest.raises(StorageError):
        read_parts([path])
    write_part(path, META, LAYOUT, {})
    with pytest.raises(StorageError):
        read_parts([path])
