"""The directory of a node that its jobs share: `Task.cache_dir`. Bounded: what was used least recently goes first.

An entry is a file or directory directly in it, used when a file in it was last read or written (as far as the file
system keeps the time of a read). Whoever runs user code holds the directory with `hold`; nothing is evicted meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEFAULT_BYTES = 10 << 30


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """`used_s`: Unix time of its last use."""

    name: str
    size_bytes: int
    used_s: float


def evicted(entries: Sequence[CacheEntry], limit_bytes: int) -> list[str]:
    """The entries to remove, the least recently used first, so that the rest fits. Pure."""
    excess = sum(entry.size_bytes for entry in entries) - limit_bytes
    names = []
    for entry in sorted(entries, key=lambda entry: (entry.used_s, entry.name)):
        if excess <= 0:
            break
        names.append(entry.name)
        excess -= entry.size_bytes
    return names


def evict(directory: Path, limit_bytes: int) -> list[str]:
    """Remove entries beyond the limit, unless somebody holds the directory; their names. Blocks on the disk.

    Raises OSError."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return []
    else:
        names = evicted([_entry(path) for path in directory.iterdir()], limit_bytes)
        for name in names:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return names
    finally:
        os.close(handle)


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Nothing is evicted from the directory meanwhile. Waits while somebody evicts. Raises OSError."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _entry(path: Path) -> CacheEntry:
    found = [path.lstat()]
    for folder, _, files in os.walk(path):
        found += [os.lstat(os.path.join(folder, name)) for name in files]
    used_s = max(max(one.st_atime, one.st_mtime) for one in found)
    return CacheEntry(name=path.name, size_bytes=sum(one.st_blocks * 512 for one in found), used_s=used_s)
