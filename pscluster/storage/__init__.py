"""Stores of snapshots: one interface over directories and object stores. Imports no torch.

A location is an absolute directory, or the URL of a store that every node reaches. Every store passes
`tests/contract/test_snapshot_store.py`. All calls block on disk or network and raise StorageError naming the place, or
DamagedError when a file is missing in a store that exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from pscluster.errors import StorageError

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Live:
    """Memory whose owner may overwrite it while it is read, after copying it: neither side waits.

    `instead`: the copy, once there is one; while it returns None, everything read of `memory` is valid."""

    memory: memoryview
    instead: Callable[[], Buffer | None]

    def read(self, use: Callable[[Buffer], T]) -> T:
        """The result of `use` on the bytes. Calls it again, with the copy, if the memory was overwritten meanwhile."""
        result = use(self.memory)
        copy = self.instead()
        return result if copy is None else use(copy)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A written file, as stored in the catalogue. `checksum`: "crc32c:<8 hex digits>" over the whole file."""

    name: str
    size_bytes: int
    checksum: str


class SnapshotStore(ABC):
    """A flat set of files under `location`. Used from one thread at a time."""

    location: str

    @abstractmethod
    def write(
        self,
        name: str,
        buffers: Iterable[Buffer | Live],
        *,
        size_bytes: int | None = None,
        checksum: Callable[[], int] | None = None,
        recycled_file: str = "",
    ) -> Written:
        """Write the buffers, one after the other, as a file. On return it is durable and replaces an older one.

        A buffer is no longer used when the next is requested; `Live` ones need `size_bytes` and `checksum`.
        `size_bytes`: of all buffers; None: they are a sequence. `checksum`: returns the CRC-32C of all of them after
        the last; None: it is computed here. `recycled_file`: the result of `set_aside`, consumed on return; passing it
        again is harmless. Readers see the complete file or none; after an error nothing is left behind."""

    @abstractmethod
    def reading(self, name: str) -> AbstractContextManager[BinaryIO]:
        """The file, seekable, while the context lasts; errors of reads in it become StorageError."""

    @abstractmethod
    def names(self) -> list[str]:
        """The complete files, in order of name; none where nothing was written yet."""

    @abstractmethod
    def below(self) -> list[str]:
        """The locations of the stores one level further down, in order of name."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Safe to repeat."""

    def set_aside(self, name: str) -> str:
        """Delete a file but keep its blocks for a later `write`; returns its `recycled_file`, empty if nothing is kept.

        `sweep` frees the blocks. A concurrent reader is affected as by `delete`; one on another machine, which the
        kernel does not know of, may read new data, and detects it by the checksums."""
        self.delete(name)
        return ""

    @abstractmethod
    def sweep(self, wanted: Callable[[str], bool]) -> None:
        """Remove incomplete files and files set aside, left by killed processes, whose names are `wanted`."""

    @abstractmethod
    def remove(self) -> None:
        """Remove everything under `location`. Safe to repeat."""


def open_store(location: str | Path) -> SnapshotStore:
    """The store at a directory or URL; nothing is created or contacted yet. Raises StorageError for a location that
    `check_location` refuses, or whose client is not installed."""
    from pscluster.storage.directory import DirectoryStore

    text = str(location)
    try:
        scheme = check_location(text).partition("://")[0]
    except ValueError as error:
        raise StorageError(str(error)) from None
    if scheme == "s3":
        from pscluster.storage.objects import ObjectStore, s3_file_system

        return ObjectStore(text, s3_file_system(text))
    return DirectoryStore(Path(text.removeprefix("file://")))


def split(location: str | Path) -> tuple[SnapshotStore, str]:
    """The store and the name of one file given by its whole location."""
    parent, _, name = str(location).rpartition("/")
    return open_store(parent or "/"), name


def check_location(text: str) -> str:
    """Return `text` if it is a valid location of a shared store. Raises ValueError with the reason otherwise."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text.startswith("/"):
            raise ValueError(f"{text!r} is not an absolute directory, nor a URL like s3://bucket/prefix")
        return text
    if scheme == "memory":
        raise ValueError("memory:// is the memory of one process, which others cannot read")
    if scheme not in ("file", "s3"):
        raise ValueError(f"{scheme}:// is not supported: give a directory, file:///directory or s3://bucket/prefix")
    if scheme == "file" and not rest.startswith("/"):
        raise ValueError(f"{text!r} names a host: write file:///directory")
    if scheme == "s3":
        parts = urlsplit(text)
        if "@" in parts.netloc:
            raise ValueError("a spec must not hold credentials: daemons take them from their environment")
        if not parts.netloc or parts.query or parts.fragment:
            raise ValueError("write s3://bucket/prefix")
    return text


def below(location: str, name: str) -> str:
    """The location of `name` under `location`."""
    return f"{location.rstrip('/')}/{name}"
