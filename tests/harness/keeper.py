"""Restarts daemons that have ended, as systemd does."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from harness.cluster import LocalCluster

RESTART_S = 0.5  # between an end and the next start, like RestartSec
_POLL_S = 0.05


class Keeper:
    """Restarts the daemons of a running cluster, each with the command that it was started with.

    A context manager; after its end nothing is restarted. Stopped daemons (SIGSTOP) count as running."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._names = cluster.names
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper")
        self.restarts: list[tuple[float, str]] = []
        """(Unix time, name) of every start."""
        self.failure: BaseException | None = None

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        if self.failure is not None and error is None:
            raise self.failure

    def _run(self) -> None:
        ended_at: dict[str, float] = {}
        try:
            while not self._closing.wait(_POLL_S):
                now = time.monotonic()
                for name in self._names:
                    if self._cluster.runs(name):
                        ended_at.pop(name, None)
                    elif now - ended_at.setdefault(name, now) >= RESTART_S:
                        self._cluster.start_daemon(name)
                        self.restarts.append((time.time(), name))
        except BaseException as failure:
            self.failure = failure
