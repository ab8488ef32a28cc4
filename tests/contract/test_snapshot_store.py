"""What every place for snapshots promises, checked on each: a directory, a file URL, an S3 server."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import pytest

from harness.held_pieces import write_part
from harness.s3 import BUCKET, S3, s3_server
from pscluster.errors import DamagedError, StorageError
from pscluster.step.layout import Layout, TensorSpec
from pscluster.storage import Live, SnapshotStore, below, open_store
from pscluster.storage.directory import DirectoryStore
from pscluster.storage.snapshot import PartMeta, part_name, read_part, read_parts, verify_file

LAYOUT = Layout((TensorSpec(names=("w",), shape=(4,), dtype="float32", kind="trained"),))
META = PartMeta(job="job", step=3, generation=1, partition=0, num_partitions=1, update_counts=(3,))


@dataclass(frozen=True)
class Place:
    """A store, and hands on what lies behind it: `begin` leaves a write half done, as a killed process does; `raw` and
    `put` read and write a file without the store; `half_done` counts what was begun."""

    store: SnapshotStore
    begin: Callable[[str], None]
    raw: Callable[[str], bytes]
    put: Callable[[str, bytes], None]
    half_done: Callable[[], int]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["directory", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param != "s3":
        directory = tmp_path / "root" / "job-a"
        prefix = "file://" if request.param == "file" else ""
        return _directory(directory, open_store(f"{prefix}{directory}"))
    server: S3 = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return _objects(server, f"{BUCKET}/{tmp_path.name}/job-a")


def _directory(directory: Path, store: SnapshotStore) -> Place:
    def begin(name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f".{name}.writing").write_bytes(b"half")

    return Place(
        store=store,
        begin=begin,
        raw=lambda name: (directory / name).read_bytes(),
        put=lambda name, data: (directory / name).write_bytes(data) and None,
        half_done=lambda: len(list(directory.glob(".*"))),
    )


def _objects(server: S3, root: str) -> Place:
    fs = server.file_system()
    key = root.partition("/")[2]

    def begin(name: str) -> None:
        fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key=f"{key}/{name}")

    return Place(
        store=open_store(f"s3://{root}"),
        begin=begin,
        raw=lambda name: fs.cat_file(f"{root}/{name}"),
        put=lambda name, data: fs.pipe_file(f"{root}/{name}", data),
        half_done=lambda: sum(upload["Key"].startswith(key) for upload in fs.list_multipart_uploads(BUCKET)),
    )


def test_what_is_written_is_there_whole(place: Place) -> None:
    buffers = [b"head", bytearray(range(200)), memoryview(b"tail")]
    written = place.store.write("a", buffers)

    data = b"".join(buffers)
    assert place.raw("a") == data
    assert (written.name, written.size_bytes) == ("a", len(data))
    assert written.checksum == f"crc32c:{crc32c.crc32c(data):08x}"
    with place.store.reading("a") as file:
        assert file.seek(0, 2) == len(data)
        file.seek(2)
        assert file.read(4) == data[2:6]
    assert place.half_done() == 0


def test_what_is_overwritten_while_it_is_written_is_there_as_it_was(place: Place) -> None:
    """Before it is read, and after: the copy counts, to the last byte."""
    before = [os.urandom(size) for size in (5, 8192, 3 << 20, (2 << 20) + 7)]
    asked = []

    def live(data: bytes, when: int) -> Live:
        memory = bytearray(b"!" * len(data) if when == 0 else data)

        def instead() -> bytes | None:
            asked.append(when)
            memory[:] = bytes(len(data)) if when < 2 else data
            return data if when < 2 else None

        return Live(memoryview(memory), instead)

    for when in range(3):
        data = b"".join(before)
        buffers = [live(part, when) for part in before]
        written = place.store.write("a", buffers, size_bytes=len(data), checksum=lambda: 0x12AB34CD)
        assert place.raw("a") == data
        assert (written.size_bytes, written.checksum) == (len(data), "crc32c:12ab34cd")
    assert asked == [when for when in range(3) for _ in before]


def test_writing_again_replaces_the_whole(place: Place) -> None:
    place.store.write("a", [b"long " * 100])
    place.store.write("a", [b"short"])
    assert place.raw("a") == b"short"


def test_an_empty_file_is_a_file(place: Place) -> None:
    written = place.store.write("a", [])
    assert (written.size_bytes, written.checksum) == (0, "crc32c:00000000")
    assert place.store.names() == ["a"]


def test_a_large_file_goes_in_parts_and_comes_back(place: Place) -> None:
    block = os.urandom(1 << 20)
    written = place.store.write("big", [block] * 40)

    verify_file(place.store, "big", 40 << 20, written.checksum)
    assert place.raw("big") == block * 40
    assert place.half_done() == 0


def test_files_are_listed_in_order_and_nothing_before_there_is_one(place: Place) -> None:
    assert place.store.names() == []
    assert place.store.below() == []
    for name in ("b", "c", "a"):
        place.store.write(name, [b"x"])
    place.begin("d")
    assert place.store.names() == ["a", "b", "c"]

    parent = open_store(place.store.location.rpartition("/")[0])
    assert parent.names() == []
    assert parent.below() == [place.store.location]


def test_deleting_is_safe_to_repeat(place: Place) -> None:
    place.store.delete("a")
    place.store.write("a", [b"x"])
    place.store.write("b", [b"x"])
    for _ in range(2):
        place.store.delete("a")
    assert place.store.names() == ["b"]


def test_what_was_set_aside_is_gone_and_gives_its_room(place: Place) -> None:
    old, new = os.urandom(3 << 20), os.urandom((2 << 20) + 5)
    place.store.write("a", [old])
    recycled_file = place.store.set_aside("a")
    assert place.store.set_aside("a") == ""
    assert place.store.names() == []

    written = place.store.write("b", [new], recycled_file=recycled_file)
    place.store.write("c", [old], recycled_file=recycled_file)  # it is used up
    verify_file(place.store, "b", len(new), written.checksum)
    assert (place.raw("b"), place.raw("c")) == (new, old)
    assert (place.store.names(), place.half_done()) == (["b", "c"], 0)


def test_sweeping_gives_room_back(place: Place) -> None:
    for name in ("a", "b"):
        place.store.write(name, [b"x"])
    recycled_file = place.store.set_aside("a")
    place.store.sweep(lambda name: name == "a")
    assert (place.store.names(), place.half_done()) == (["b"], 0)
    place.store.write("c", [b"new"], recycled_file=recycled_file)
    assert place.raw("c") == b"new"


def test_who_reads_what_is_set_aside_goes_on(tmp_path: Path) -> None:
    store, old = DirectoryStore(tmp_path / "store"), os.urandom(2 << 20)
    store.write("a", [old])
    with store.reading("a") as file:
        store.write("b", [bytes(2 << 20)], recycled_file=store.set_aside("a"))
        assert file.read() == old
    assert os.listdir(tmp_path / "store") == ["b"]


@pytest.mark.parametrize("how", ["a hard link is a backup", "it was moved to another disk"])
def test_the_room_of_what_is_elsewhere_too_is_not_taken(how: str, tmp_path: Path) -> None:
    store, old = DirectoryStore(tmp_path / "store"), os.urandom(2 << 20)
    store.write("a", [old])
    part, backup = tmp_path / "store" / "a", tmp_path / "backup"
    if "hard link" in how:
        backup.hardlink_to(part)
    else:
        part.rename(backup)
        part.symlink_to(backup)
    store.write("b", [bytes(2 << 20)], recycled_file=store.set_aside("a"))
    assert backup.read_bytes() == old
    assert os.listdir(tmp_path / "store") == ["b"]


def test_removing_takes_everything_and_is_safe_to_repeat(place: Place) -> None:
    place.store.write("a", [b"x"])
    neighbour = open_store(place.store.location + "b")
    neighbour.write("a", [b"y"])
    for _ in range(2):
        place.store.remove()
    assert place.store.names() == []
    assert neighbour.names() == ["a"]


def test_removing_takes_everything_while_a_file_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "job-a")
    for step in range(4):
        store.write(f"step-{step}", [b"x"])
    unlink, renamed = os.unlink, []

    def racing(path: Any, **where: Any) -> None:
        if not renamed:
            renamed.append(path)
            os.rename(tmp_path / "job-a" / path, tmp_path / "job-a" / "its-name")
        unlink(path, **where)

    monkeypatch.setattr(os, "unlink", racing)
    store.remove()
    assert renamed and os.listdir(tmp_path) == []


def test_a_file_that_is_gone_is_damage(place: Place) -> None:
    place.store.write("other", [b"x"])
    with pytest.raises(DamagedError, match=f"{place.store.location}/a is gone"):
        with place.store.reading("a"):
            pytest.fail("there is nothing to read")


@pytest.mark.parametrize("size_bytes", [100, 40 << 20], ids=["small", "in parts"])
def test_a_write_that_fails_in_its_midst_leaves_nothing(
    place: Place, size_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.store.write("a", [b"old"])
    real, calls = crc32c.crc32c, []

    def broken(data: object, total: int = 0) -> int:
        calls.append(data)
        if len(calls) == 2:
            raise OSError(errno.EIO, "the disk is on fire")
        return int(real(data, total))

    with monkeypatch.context() as patch:
        patch.setattr(crc32c, "crc32c", broken)
        with pytest.raises(StorageError, match=r"/a: .*the disk is on fire"):
            place.store.write("a", [bytes(size_bytes), b"more"])
    assert len(calls) == 2

    assert place.raw("a") == b"old"
    assert place.store.names() == ["a"]
    assert place.half_done() == 0


def test_what_killed_processes_had_begun_is_swept(place: Place) -> None:
    place.store.write("mine-1", [b"x"])
    for name in ("mine-2", "theirs-2"):
        place.begin(name)
    assert place.half_done() == 2

    place.store.sweep(lambda name: name.startswith("mine"))

    assert place.half_done() == 1
    assert place.store.names() == ["mine-1"]


def test_a_snapshot_lives_there(place: Place) -> None:
    location = below(place.store.location, part_name(3, 0, 1))
    written = write_part(location, META, LAYOUT, {(0, "values"): bytes(range(64))})

    layout, words = read_parts([location])

    assert layout == LAYOUT
    assert [bytes(data) for data in words] == [bytes(range(64))]
    verify_file(place.store, written.name, written.size_bytes, written.checksum)


def test_a_snapshot_that_was_cut_or_changed_is_damage(place: Place) -> None:
    name = part_name(3, 0, 1)
    location = below(place.store.location, name)
    written = write_part(location, META, LAYOUT, {(0, "values"): bytes(range(64))})
    data = place.raw(name)
    changed = [data[:length] for length in range(0, len(data), 41)] + [data + b"\0"]
    changed += [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(0, len(data), 41)]
    for wrong in changed:
        place.put(name, wrong)
        with pytest.raises(DamagedError, match=name):
            read_part(location)
        with pytest.raises(DamagedError, match=name):
            verify_file(place.store, name, written.size_bytes, written.checksum)


# what only one of them can meet


def test_a_bucket_that_is_not_there_is_no_damage(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://nowhere/job")
    with pytest.raises(StorageError, match="cannot read s3://nowhere/job/a") as away:
        with store.reading("a"):
            pytest.fail("there is nothing to read")
    assert not isinstance(away.value, DamagedError)
    with pytest.raises(StorageError, match="cannot write s3://nowhere/job/a"):
        store.write("a", [b"x"])


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("memory://x", "not supported|one process"),
        ("ftp://host/x", "ftp:// is not supported"),
        ("relative/path", "not an absolute directory"),
        ("", "not an absolute directory"),
        ("file://host/x", "names a host"),
        ("s3://", "s3://bucket/prefix"),
        ("s3://key:secret@bucket/x", "credentials"),
        ("s3://bucket/x?versionId=1", "s3://bucket/prefix"),
    ],
)
def test_other_locations_are_refused_by_name(location: str, said: str) -> None:
    with pytest.raises(StorageError, match=said):
        open_store(location)
