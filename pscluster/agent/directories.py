"""An agent's directories, and the removal of what a killed predecessor left.

    <state_dir>/agent.lock   locked while an agent runs: two cannot share a state directory
    <state_dir>/bundles/     extracted code, by content
    <state_dir>/jobs/        working directories of jobs without a bundle
    <state_dir>/snapshots/   of a server with --own-store: its partitions' parts, and copies of others'; kept
    <runtime dir>/           sockets of its processes; the path is derived from the state directory

The processes of a killed agent end with it. Their sockets remain, and are removed at the next start or by
`remove_runtime`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from pscluster.errors import StateError, StorageError
from pscluster.settings import make_runtime_dir, runtime_dir
from pscluster.storage.directory import DirectoryStore


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
        """Create what is missing, lock it, and remove what a predecessor left.

        Raises StorageError when the directory cannot be written, StateError when another agent runs in it.
        """
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
        remove_runtime(state_dir)
        directories = cls(state_dir, make_runtime_dir(state_dir), lock)
        directories._clear(directories.jobs)
        directories._clear_unfinished()
        directories._clear_half_written()
        return directories

    def release(self) -> None:
        """Remove the sockets' directory and release the lock."""
        remove_runtime(self._state_dir)
        os.close(self._lock)

    def _clear(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {directory}: {error.strerror}") from None

    def _clear_unfinished(self) -> None:
        self.bundles.mkdir(mode=0o700, exist_ok=True)
        for path in self.bundles.iterdir():
            if path.name.startswith(".") or path.suffix == ".part":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _clear_half_written(self) -> None:
        """Parts of snapshots, and copies of others', that were not written completely."""
        for location in DirectoryStore(self.snapshots).below():
            DirectoryStore(Path(location)).sweep(lambda _: True)


def remove_runtime(state_dir: Path) -> None:
    """Remove the sockets' directory of an agent that does not run. Idempotent; never follows a link."""
    path = runtime_dir(state_dir)
    if path.is_symlink():
        raise StorageError(f"{path} is a link, not a directory", action=f"remove {path}")
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from None
