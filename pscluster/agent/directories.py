"""An agent's directories: its bundle cache, and the removal of what a killed predecessor left.

    <state_dir>/agent.lock   locked while an agent runs: two cannot share a state directory
    <state_dir>/bundles/     extracted code, by content
    <state_dir>/jobs/        working directories of jobs without a bundle
    <state_dir>/snapshots/   of a server with --own-store: its partitions' parts, and copies of others'; kept
    <runtime dir>/           sockets of its processes; the path is derived from the state directory

The processes of a killed agent end with it. Their sockets remain, and are removed at the next start.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import structlog

from pscluster.errors import BundleError, StateError, StorageError
from pscluster.job.bundle import CAP_BYTES, extract
from pscluster.settings import make_runtime_dir, remove_runtime_dir
from pscluster.storage.directory import DirectoryStore

KEPT = 16
"""Extracted bundles kept beside those in use."""
Fetch = Callable[[str], AsyncIterator[bytes]]
"""The chunks of the bundle with this digest; raises PsError."""
_log = structlog.get_logger(__name__)


class AgentDirectories:
    """Created by `claim`; holds the lock until `release`."""

    def __init__(self, state_dir: Path, runtime: Path, lock: int) -> None:
        self.bundles = state_dir / "bundles"
        self.jobs = state_dir / "jobs"
        self.snapshots = state_dir / "snapshots"
        self.runtime = runtime
        self._state_dir = state_dir
        self._lock = lock

    @classmethod
    def claim(cls, state_dir: Path) -> AgentDirectories:
        """Create what is missing, lock it, and remove what a predecessor left. Raises StorageError, and StateError when
        another agent runs in it."""
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(state_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot use the state directory {state_dir}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StateError(
                f"another agent runs in {state_dir}", action="stop it, or give this one its own --state-dir"
            ) from None
        remove_runtime_dir(state_dir)
        directories = cls(state_dir, make_runtime_dir(state_dir), lock)
        directories._clear()
        return directories

    def release(self) -> None:
        """Remove the sockets' directory and release the lock."""
        remove_runtime_dir(self._state_dir)
        os.close(self._lock)

    def _clear(self) -> None:
        """Remove working directories, and bundles and snapshot parts that were not written completely."""
        shutil.rmtree(self.jobs, ignore_errors=True)
        try:
            self.jobs.mkdir(mode=0o700, exist_ok=True)
            self.bundles.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {error.filename}: {error.strerror}") from None
        for path in self.bundles.iterdir():
            if path.name.startswith(".") or path.suffix == ".part":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for location in DirectoryStore(self.snapshots).below():
            DirectoryStore(Path(location)).sweep(lambda _: True)


class BundleCache:
    """Directories named by content digest below `directory`. Used from the agent's loop; disk work runs on threads."""

    def __init__(self, directory: Path, fetch: Fetch) -> None:
        self._directory = directory
        self._fetch = fetch
        self._locks: dict[str, asyncio.Lock] = {}
        present = sorted(path.name for path in directory.iterdir() if path.is_dir())
        self._used: OrderedDict[str, None] = OrderedDict.fromkeys(present)

    async def ensure(self, sha256: str) -> Path:
        """The directory of the bundle, downloaded if missing. Safe to call concurrently and to repeat. Raises
        BundleError for content that is damaged or unsafe, StorageError, and what `fetch` raises."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise BundleError(f"{sha256!r} is not a sha256 digest")
        target = self._directory / sha256
        async with self._locks.setdefault(sha256, asyncio.Lock()):
            if not target.is_dir():
                await self._download(sha256, target)
        self._used[sha256] = None
        self._used.move_to_end(sha256)
        return target

    async def trim(self, in_use: Collection[str]) -> None:
        """Remove the least recently used beyond KEPT, never one of `in_use`."""
        idle = [sha256 for sha256 in self._used if sha256 not in in_use]
        for sha256 in idle[: max(0, len(idle) - KEPT)]:
            del self._used[sha256]
            self._locks.pop(sha256, None)
            await asyncio.to_thread(shutil.rmtree, self._directory / sha256, ignore_errors=True)

    async def _download(self, sha256: str, target: Path) -> None:
        part = self._directory / f"{sha256}.part"
        digest = hashlib.sha256()
        size = 0
        try:
            with part.open("wb") as sink:
                async for chunk in self._fetch(sha256):
                    size += len(chunk)
                    if size > CAP_BYTES:
                        raise BundleError(f"bundle {sha256[:12]} is longer than {CAP_BYTES} bytes")
                    digest.update(chunk)
                    sink.write(chunk)
            if digest.hexdigest() != sha256:
                raise BundleError(f"bundle {sha256[:12]} does not match its digest")
            await asyncio.to_thread(extract, part, target)
        except OSError as error:
            raise StorageError(f"cannot store bundle {sha256[:12]}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
        _log.info("bundle extracted", sha256=sha256, size_bytes=size)
