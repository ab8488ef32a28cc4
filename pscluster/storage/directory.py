"""Snapshots in a directory, local or on a shared file system."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import crc32c

from pscluster.errors import DamagedError, StorageError
from pscluster.storage import Buffer, Live, SnapshotStore, Written
from pscluster.storage.direct import DirectFile

_WRITING = ".writing"


class DirectoryStore(SnapshotStore):
    """Files appear atomically: written under a temporary name, synced and renamed, then the directory synced."""

    def __init__(self, directory: Path) -> None:
        self.location = str(directory)
        self._directory = directory

    def create(self) -> None:
        """Create the directory durably. Safe to repeat. Raises StorageError."""
        with _named(f"cannot create {self._directory}"):
            _make_durably(self._directory)

    def write(
        self,
        name: str,
        buffers: Iterable[Buffer | Live],
        *,
        size_bytes: int | None = None,  # noqa: ARG002 - not needed
        checksum: Callable[[], int] | None = None,
        recycled_file: str = "",
    ) -> Written:
        incoming = Incoming(self._directory, name, checksum, recycled_file)
        try:
            for buffer in buffers:
                incoming.add(buffer)
            return incoming.commit()
        finally:
            incoming.abort()

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        path = self._directory / name
        with _named(f"cannot read {path}"):
            try:
                with path.open("rb") as file:
                    yield file
            except FileNotFoundError as error:
                if self._directory.is_dir():
                    raise DamagedError(f"{path} is gone: {error.strerror}") from None
                raise StorageError(
                    f"cannot read {path}: there is no directory {self._directory}",
                    action="mount it where this process runs, then resume",
                    details={"errno": str(error.errno)},
                ) from None

    def names(self) -> list[str]:
        with _named(f"cannot list {self._directory}"):
            return [entry.name for entry in self._entries() if not entry.name.startswith(".") and entry.is_file()]

    def below(self) -> list[str]:
        with _named(f"cannot list {self._directory}"):
            return [entry.path for entry in self._entries() if entry.is_dir()]

    def delete(self, name: str) -> None:
        path = self._directory / name
        with _named(f"cannot delete {path}"), contextlib.suppress(NotADirectoryError):  # no such store, so no such file
            path.unlink(missing_ok=True)

    def set_aside(self, name: str) -> str:
        path = self._directory / name
        with _named(f"cannot delete {path}"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.rename(_temporary(self._directory, name))
            _sync_directory(self._directory)  # before its blocks are overwritten
            return name
        return ""

    def sweep(self, wanted: Callable[[str], bool]) -> None:
        with _named(f"cannot list {self._directory}"):
            entries = self._entries()
        for entry in entries:
            name = entry.name
            if name.startswith(".") and name.endswith(_WRITING) and wanted(name[1 : -len(_WRITING)]):
                self.delete(name)

    def remove(self) -> None:
        with _named(f"cannot remove {self._directory}"):
            while self._directory.exists():
                with contextlib.suppress(FileNotFoundError):  # a file may be renamed meanwhile
                    shutil.rmtree(self._directory)

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._directory) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []


class Incoming:
    """A file being written to a directory. `commit` makes it durable under its name; always `abort` at the end.

    Blocks on the disk. Raises StorageError. At most one of each name at a time in a directory. `checksum`: returns the
    CRC-32C of everything at the end, so that it need not be computed here."""

    def __init__(
        self, directory: Path, name: str, checksum: Callable[[], int] | None = None, recycled_file: str = ""
    ) -> None:
        """`recycled_file`: a file of the directory that was set aside."""
        self._path = directory / name
        self._temporary = _temporary(directory, name)
        self._size = self._total = 0
        self._checksum = checksum
        with _named(f"cannot write {self._path}"):
            _make_durably(directory)
            self._file = DirectFile(self._temporary, _temporary(directory, recycled_file) if recycled_file else None)

    def add(self, buffer: Buffer | Live) -> None:
        view = memoryview(buffer.memory if isinstance(buffer, Live) else buffer).cast("B")
        with _named(f"cannot write {self._path}"):
            self._size += view.nbytes
            self._file.write(view)
            if isinstance(buffer, Live) and (copy := buffer.instead()) is not None:
                view = memoryview(copy).cast("B")
                self._file.rewrite(view)
            if self._checksum is None:
                self._total = crc32c.crc32c(view, self._total)

    def commit(self, expected: Written | None = None) -> Written:
        """Publish the file. Raises DamagedError when the content is not as `expected`."""
        total = self._total if self._checksum is None else self._checksum()
        written = Written(name=self._path.name, size_bytes=self._size, checksum=f"crc32c:{total:08x}")
        if expected is not None and written != expected:
            raise DamagedError(f"{self._path} is not as expected: {written}, not {expected}")
        with _named(f"cannot write {self._path}"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
            _sync_directory(self._path.parent)
        return written

    def abort(self) -> None:
        """Remove what is not committed. Safe to repeat, and after `commit`."""
        with contextlib.suppress(OSError):  # what cannot be written may not be removable either
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def _temporary(directory: Path, name: str) -> Path:
    """The path of a file while it is written, or set aside."""
    return directory / f".{name}{_WRITING}"


def _make_durably(directory: Path) -> None:
    """Create the directory and its parents, and sync each parent, so that the names survive a power loss."""
    if directory.is_dir():
        return
    _make_durably(directory.parent)
    directory.mkdir(exist_ok=True)
    _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Raise StorageError for an OSError; inspecting an entry of a directory can fail like listing it."""
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        action = "free space; training continues, and the next snapshot is tried" if full else ""
        details = {"errno": str(error.errno)}
        raise StorageError(f"{what}: {error.strerror or error}", action=action, details=details) from None
