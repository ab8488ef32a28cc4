"""Where snapshots live: one interface over directories and object stores. Free of torch.

`tests/contract/test_snapshot_store.py` is what every store passes. All calls block on disk or network and raise
StorageError naming the place; DamagedError when a file that should be there is gone though its store is not.
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

__all__ = ["Buffer", "Live", "SnapshotStore", "Written", "below", "check_location", "open_store", "split"]

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Live:
    """Memory whose owner may overwrite it while it is read, but copies it first: nobody waits for anybody.

    `instead`: the copy, once there is one; while it answers None, all that was read of `memory` was still right."""

    memory: memoryview
    instead: Callable[[], Buffer | None]

    def read(self, use: Callable[[Buffer], T]) -> T:
        """What `use` makes of the bytes. Called a second time, with the copy, when what it read was overwritten."""
        result = use(self.memory)
        copy = self.instead()
        return result if copy is None else use(copy)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written, as the catalogue keeps it. `checksum`: "crc32c:<8 hex digits>" over the whole file."""

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
        room: str = "",
    ) -> Written:
        """Make a file of the buffers, one after the other. On return it is durable and replaces an older one. `room`:
        what `set_aside` gave; on return it is used up, and to give it again does no harm.

        Each buffer is done with when the next is asked for; those that are `Live` need `size_bytes` and `checksum`.
        `size_bytes`: of all of them; None: they are a sequence. `checksum`: tells the CRC-32C of them all, once the
        last was asked for; None: it is computed here.
        Whoever looks sees all of it or nothing; after an error nothing is left behind."""

    @abstractmethod
    def reading(self, name: str) -> AbstractContextManager[BinaryIO]:
        """The file, seekable, while the context lasts; what its reads raise there becomes a StorageError."""

    @abstractmethod
    def names(self) -> list[str]:
        """The whole files there are, in order of name; none where nothing was written yet."""

    @abstractmethod
    def below(self) -> list[str]:
        """The locations of the stores one level further down, in order of name."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Safe to repeat."""

    def set_aside(self, name: str) -> str:
        """Delete a file and keep its room for a `write`; what to give that; empty: nothing is kept.

        `sweep` gives the room back. Who reads the file as it is deleted fares no worse than with `delete`, unless on
        another machine that the kernel here knows nothing of: its checksums tell."""
        self.delete(name)
        return ""

    @abstractmethod
    def sweep(self, wanted: Callable[[str], bool]) -> None:
        """Remove what killed processes had begun to write, or had set aside, of the names that are `wanted`."""

    @abstractmethod
    def remove(self) -> None:
        """Remove everything under `location`. Safe to repeat."""


def open_store(location: str | Path) -> SnapshotStore:
    """The store at a directory or URL; nothing is created or asked yet.

    Raises StorageError for a location that `check_location` refuses, or whose client is not installed."""
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
    """`text`, when it names a directory or store that can be shared. Raises ValueError saying what is wrong with it."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text.startswith("/"):
            raise ValueError(f"{text!r} is not an absolute directory, nor a URL like s3://bucket/prefix")
        return text
    if scheme == "memory":
        raise ValueError("memory:// is the memory of one process: no other would see what was written there")
    if scheme not in ("file", "s3"):
        raise ValueError(f"{scheme}:// is not supported: give a directory, file:///directory or s3://bucket/prefix")
    if scheme == "file" and not rest.startswith("/"):
        raise ValueError(f"{text!r} names a host: write file:///directory")
    if scheme == "s3":
        _check_bucket(text)
    return text


def below(location: str, name: str) -> str:
    """The location of `name` under `location`."""
    return f"{location.rstrip('/')}/{name}"


def _check_bucket(text: str) -> None:
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ValueError("credentials do not belong in a spec: daemons take them from their environment")
    if not parts.netloc or parts.query or parts.fragment:
        raise ValueError("write s3://bucket/prefix")
