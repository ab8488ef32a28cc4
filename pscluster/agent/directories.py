"""An agent's directories: its bundles, and the removal of what a killed predecessor left.

    <state_dir>/agent.lock   locked while an agent runs: two cannot share a state directory
    <state_dir>/identity/    of a member of a cluster with certificates: see `pscluster.agent.membership`
    <state_dir>/bundles/     archives of code, by content
    <state_dir>/jobs/        working directories, one for each process, with a copy of the job's code
    <state_dir>/scratch/     what the processes of a job share here (Task.scratch_dir), removed with the job
    <state_dir>/cache/       what all jobs share here (Task.cache_dir), bounded
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
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from pscluster.errors import BundleError, StateError, StorageError
from pscluster.job.bundle import CAP_BYTES, extract
from pscluster.settings import make_runtime_dir, remove_runtime_dir
from pscluster.storage.directory import DirectoryStore

SUFFIX = ".tar.gz"
KEPT = 16
"""Bundles kept beside those in use."""
Fetch = Callable[[str], AsyncIterator[bytes]]
"""The chunks of the bundle with this digest; raises PsError."""
_log = structlog.get_logger(__name__)


class AgentDirectories:
    """Created by `claim`; holds the lock until `release`."""

    def __init__(self, state_dir: Path, runtime: Path, lock: int) -> None:
        self.bundles = state_dir / "bundles"
        self.jobs = state_dir / "jobs"
        self.scratch = state_dir / "scratch"
        self.cache = state_dir / "cache"
        self.snapshots = state_dir / "snapshots"
        self.runtime = runtime
        self.state_dir = state_dir
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
        remove_runtime_dir(self.state_dir)
        os.close(self._lock)

    def let_others_pass(self, allowed: bool) -> None:
        """Whether processes of another user may pass through these directories to those that are given to them; they
        cannot list them. Raises StorageError."""
        for directory in (self.state_dir, self.jobs, self.scratch, self.runtime):
            _set_mode(directory, 0o711 if allowed else 0o700)

    def let_others_pass_to_sockets(self) -> None:
        """Processes of another user may pass to the sockets that they are admitted to. Raises StorageError."""
        _set_mode(self.runtime, 0o711)

    def _clear(self) -> None:
        """Remove working directories, and bundles and snapshot parts that were not written completely."""
        shutil.rmtree(self.jobs, ignore_errors=True)
        try:
            for directory in (self.jobs, self.bundles, self.scratch, self.cache):
                directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {error.filename}: {error.strerror}") from None
        for path in self.bundles.iterdir():
            if path.suffix == ".part" or path.is_dir():  # older versions kept directories
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for location in DirectoryStore(self.snapshots).below():
            DirectoryStore(Path(location)).sweep(lambda _: True)


def _set_mode(directory: Path, mode: int) -> None:
    try:
        directory.chmod(mode)
    except OSError as error:
        raise StorageError(f"cannot change the mode of {directory}: {error.strerror}") from None


class BundleCache:
    """Code bundles below `directory`, each an archive named by its digest. Used from the agent's loop.

    Every process gets its files from the archive anew, so no user code ever sees those of another process, and an
    archive that was changed is not used. Disk work runs on threads."""

    def __init__(self, directory: Path, fetch: Fetch) -> None:
        self._directory = directory
        self._fetch = fetch
        # A lock goes with its last user, never while somebody waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        present = sorted(path.name.removesuffix(SUFFIX) for path in directory.glob(f"*{SUFFIX}"))
        self._used: OrderedDict[str, None] = OrderedDict.fromkeys(present)

    @property
    def held(self) -> tuple[str, ...]:
        """The digests of all that is kept, the least recently used first."""
        return tuple(self._used)

    async def unpack(self, sha256: str, target: Path) -> None:
        """Write the bundle's files to `target`, a new directory. The archive is downloaded if it is missing or is not
        what its digest says. Safe to call concurrently. Cancelled, it writes nothing from when it returns.

        Raises BundleError for content that does not match its digest or cannot be extracted safely, StorageError when
        it cannot be written, and what `fetch` raises.
        """
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise BundleError(f"{sha256!r} is not a sha256 digest")
        async with self._locks.setdefault(sha256, asyncio.Lock()):
            archive = self._archive(sha256)
            if not await asyncio.to_thread(_is_sound, archive, sha256):
                await self._download(sha256, archive)
            extraction = asyncio.create_task(asyncio.to_thread(extract, archive, target))
            try:
                await asyncio.shield(extraction)
            except asyncio.CancelledError:
                await asyncio.wait({extraction})
                raise
            except BundleError:
                archive.unlink(missing_ok=True)
                raise
            self._used[sha256] = None
            self._used.move_to_end(sha256)

    async def trim(self, in_use: Collection[str]) -> None:
        """Remove the least recently used beyond KEPT, never one of `in_use`."""
        idle = [sha256 for sha256 in self._used if sha256 not in in_use]
        await self.remove(idle[: max(0, len(idle) - KEPT)])

    async def remove(self, unused: Iterable[str]) -> None:
        """Remove these bundles. Safe at any time: one that is needed again is downloaded again."""
        for sha256 in unused:
            async with self._locks.setdefault(sha256, asyncio.Lock()):
                self._used.pop(sha256, None)
                self._archive(sha256).unlink(missing_ok=True)

    def _archive(self, sha256: str) -> Path:
        return self._directory / f"{sha256}{SUFFIX}"

    async def _download(self, sha256: str, archive: Path) -> None:
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
            part.chmod(0o400)
            part.replace(archive)
        except OSError as error:
            raise StorageError(f"cannot store bundle {sha256[:12]}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
        _log.info("bundle stored", sha256=sha256, size_bytes=size)


def _is_sound(archive: Path, sha256: str) -> bool:
    """Whether the archive is there, and is what its digest says: user code of the same account may change it."""
    try:
        with archive.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False
