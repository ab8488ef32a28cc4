"""A lock file that processes of one user take in turn. The kernel releases it when its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pscluster.errors import StateError

_WAIT_S = 10.0
_RETRY_S = 0.02


@contextmanager
def exclusive(path: Path, wait_s: float = _WAIT_S) -> Iterator[None]:
    """Hold the lock in the block. Raises StateError when another process holds it for longer than `wait_s`, OSError
    when the file cannot be made."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while not _taken(descriptor):
            if time.monotonic() >= deadline:
                raise StateError(f"another process holds {path}", action="try again")
            time.sleep(_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
