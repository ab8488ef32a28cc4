"""Bundles: equal directories give equal bytes; nothing dangerous goes in or comes out."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pscluster.errors import BundleError, StorageError
from pscluster.job import bundle
from pscluster.job.bundle import extract, pack


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_directory_survives_the_round_trip(tmp_path: Path) -> None:
    source = write(tmp_path / "src", {"task.py": "x = 1", "pkg/__init__.py": "", "pkg/deep/a.txt": "ü"})
    (source / "run.sh").write_text("#!/bin/sh")
    (source / "run.sh").chmod(0o755)
    packed = pack(source)
    (tmp_path / "b").write_bytes(packed.data)
    extract(tmp_path / "b", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(source)
    assert packed.files == tuple(sorted(tree(source)))
    assert packed.sha256 == hashlib.sha256(packed.data).hexdigest()
    assert os.access(tmp_path / "out/run.sh", os.X_OK)
    assert not os.access(tmp_path / "out/task.py", os.X_OK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "out", "src"]


def test_equal_directories_give_equal_bundles(tmp_path: Path) -> None:
    files = {"b.py": "2", "a/c.py": "3", "a.py": "1"}
    first = write(tmp_path / "one", files)
    second = write(tmp_path / "two", dict(reversed(files.items())))
    os.utime(second / "a.py", (1, 1))
    assert pack(first).data == pack(second).data
    (second / "a.py").write_text("other")
    assert pack(first).sha256 != pack(second).sha256


def test_gitignore_is_respected_at_every_depth(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        {
            ".gitignore": "*.log\n/data/\nout\n",
            "task.py": "",
            "x.log": "",
            "data/big.bin": "",
            "sub/data/kept.txt": "",
            "sub/.gitignore": "!keep.log\nlocal.txt\n",
            "sub/keep.log": "",
            "sub/other.log": "",
            "sub/local.txt": "",
            "sub/out/a": "",
            ".git/config": "",
            "__pycache__/t.pyc": "",
            "sub/__pycache__/t.pyc": "",
            ".venv/bin/python": "",
        },
    )
    assert pack(source).files == (".gitignore", "sub/.gitignore", "sub/data/kept.txt", "sub/keep.log", "task.py")


def test_a_link_is_refused_by_name_unless_ignored(tmp_path: Path) -> None:
    write(tmp_path, {"task.py": ""})
    (tmp_path / "secret").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="secret is a link"):
        pack(tmp_path)
    (tmp_path / ".gitignore").write_text("secret\n")
    assert "secret" not in pack(tmp_path).files


def test_a_special_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="pipe is not a regular file"):
        pack(tmp_path)


def test_too_big_a_directory_names_its_biggest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "CAP_BYTES", 1 << 20)
    write(tmp_path, {"small.py": "x", "huge.bin": "y" * (1 << 20)})
    with pytest.raises(BundleError, match=r"huge\.bin \(1\.0 MiB\)") as caught:
        pack(tmp_path)
    assert ".gitignore" in caught.value.action


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_FILES", 3)
    write(tmp_path, {f"{n}.py": "" for n in range(4)})
    with pytest.raises(BundleError, match="more than 3 files"):
        pack(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a directory"):
        pack(tmp_path / "absent")


def crafted(path: Path, build: Callable[[tarfile.TarFile], None]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        build(archive)
    return path


def member(name: str, data: bytes = b"x", **fields: object) -> Callable[[tarfile.TarFile], None]:
    def build(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for key, value in fields.items():
            setattr(info, key, value)
        archive.addfile(info, io.BytesIO(data))

    return build


@pytest.mark.parametrize(
    "build",
    [
        member("../outside"),
        member("a/../../outside"),
        member("/tmp/outside"),
        member(""),
        member("link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard", b"", type=tarfile.LNKTYPE, linkname="task.py"),
        member("device", b"", type=tarfile.CHRTYPE),
        member("pipe", b"", type=tarfile.FIFOTYPE),
        member("folder", b"", type=tarfile.DIRTYPE),
    ],
)
def test_a_crafted_member_is_refused_and_leaves_nothing(
    tmp_path: Path, build: Callable[[tarfile.TarFile], None]
) -> None:
    def both(archive: tarfile.TarFile) -> None:
        member("good.py")(archive)
        build(archive)

    crafted(tmp_path / "b", both)
    with pytest.raises(BundleError):
        extract(tmp_path / "b", tmp_path / "jobs/out")
    assert not (tmp_path / "outside").exists()
    assert not Path("/tmp/outside").exists()
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_file_given_twice_or_as_directory_too_is_refused(tmp_path: Path) -> None:
    for second in ("a", "a/b"):

        def build(archive: tarfile.TarFile, second: str = second) -> None:
            member("a")(archive)
            member(second)(archive)

        crafted(tmp_path / "b", build)
        with pytest.raises(BundleError, match="twice"):
            extract(tmp_path / "b", tmp_path / "jobs/out")
        assert list((tmp_path / "jobs").iterdir()) == []


def test_an_archive_bomb_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "CAP_BYTES", 1 << 20)
    crafted(tmp_path / "b", member("zeros", bytes(2 << 20)))
    with pytest.raises(BundleError, match="unpacks to more than 1 MiB"):
        extract(tmp_path / "b", tmp_path / "jobs/out")
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_header_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "CAP_BYTES", 1 << 20)
    monkeypatch.setattr(bundle, "MAX_FILES", 10)
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 32
    with gzip.open(tmp_path / "b", "wb") as sink:
        sink.write(long_name.tobuf())
        for _ in range(8):
            sink.write(bytes(1 << 20))
    with pytest.raises(BundleError):
        extract(tmp_path / "b", tmp_path / "jobs/out")


def test_extracting_again_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(pack(write(tmp_path / "src", {"a.py": "1"})).data)
    extract(tmp_path / "b", tmp_path / "out")
    (tmp_path / "out/made-by-job").write_text("")
    extract(tmp_path / "b", tmp_path / "out")
    assert (tmp_path / "out/made-by-job").exists()


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        extract(tmp_path / "b", tmp_path / "file/out")
    with pytest.raises(StorageError):
        extract(tmp_path / "absent", tmp_path / "out")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_bundle_gives_a_named_error_or_the_very_files(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    source = write(root / "src", {"a.py": "x" * 300, "b/c.py": "y"})
    damaged = bytearray(pack(source).data)
    position = data.draw(st.integers(0, len(damaged) - 1))
    if data.draw(st.booleans()):
        del damaged[position:]
    else:
        damaged[position] ^= data.draw(st.integers(1, 255))
    (root / "b").write_bytes(damaged)
    try:
        extract(root / "b", root / "jobs/out")
    except BundleError:
        assert list((root / "jobs").iterdir()) == []
    else:
        assert tree(root / "jobs/out") == tree(source)
