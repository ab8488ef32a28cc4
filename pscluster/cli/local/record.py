"""The state directory of a local cluster: `cluster.json`, which identifies its daemons, and the lock."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pscluster.errors import StateError, StorageError

_VERSION = 1
_LOCK_TIMEOUT_S = 120.0
_RETRY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """One started daemon. `name`: "master", "worker-0", "server-1"; pid and `created_s` (Unix time of the process's
    start) together identify one process for ever."""

    name: str
    pid: int
    created_s: float

    @property
    def role(self) -> str:
        """ "master", "worker" or "server"."""
        return self.name.partition("-")[0]


def record_path(state_dir: Path) -> Path:
    return state_dir / "cluster.json"


def load(state_dir: Path) -> tuple[Daemon, ...]:
    """The recorded daemons, running or not. A missing or damaged record is an empty one."""
    try:
        data = json.loads(record_path(state_dir).read_text(encoding="utf-8"))
        return tuple(
            Daemon(name=str(d["name"]), pid=int(d["pid"]), created_s=float(d["created_s"])) for d in data["daemons"]
        )
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StorageError(f"cannot read {record_path(state_dir)}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        # Nothing is lost: running daemons are found without it, and the next `up` writes it again.
        return ()


def save(state_dir: Path, address: str, daemons: tuple[Daemon, ...]) -> None:
    """Replace the record atomically."""
    body = {"version": _VERSION, "address": address, "daemons": [dataclasses.asdict(daemon) for daemon in daemons]}
    path = record_path(state_dir)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(state_dir: Path, print_info: Callable[[str], None], timeout_s: float = _LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the directory's lock, which the kernel releases when its holder dies. Waits for another holder, and prints
    that; raises StateError after `timeout_s`."""
    try:
        descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write in {state_dir}: {error.strerror}") from None
    try:
        _acquire(descriptor, state_dir, print_info, time.monotonic() + timeout_s)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, state_dir: Path, print_info: Callable[[str], None], deadline: float) -> None:
    printed = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StateError(f"another psctl up or down holds {state_dir}", action="try again") from None
        if not printed:
            print_info(f"waiting for another psctl up or down on {state_dir}")
            printed = True
        time.sleep(_RETRY_S)
