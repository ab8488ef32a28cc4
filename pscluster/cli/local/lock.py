"""One `psctl up` or `down` at a time on a state directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pscluster.errors import StateError, StorageError

_PATIENCE_S = 120.0
_RETRY_S = 0.1


@contextlib.contextmanager
def locked(state_dir: Path, say: Callable[[str], None], patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Hold the directory's lock. Waits for another holder, saying so; StateError when that takes too long.

    The kernel lets go of the lock when its holder dies, so that none is ever stale.
    """
    try:
        descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write in {state_dir}: {error.strerror}") from None
    try:
        _acquire(descriptor, state_dir, say, time.monotonic() + patience_s)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, state_dir: Path, say: Callable[[str], None], deadline: float) -> None:
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StateError(f"another psctl up or down holds {state_dir}", action="try again") from None
        if not told:
            say(f"waiting for another psctl up or down on {state_dir}")
            told = True
        time.sleep(_RETRY_S)
