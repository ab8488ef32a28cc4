"""Restarts daemons that have ended, as systemd does."""

from __future__ import annotations

import subprocess
import threading
import time
from types import TracebackType

import psutil

from harness.cluster import LocalCluster
from pscluster.cli.local import record
from pscluster.cli.local.processes import command, daemon_dir, variables
from pscluster.cli.local.record import Daemon
from pscluster.settings import master_address, token_file

RESTART_S = 0.5  # between an end and the next start, like RestartSec
_POLL_S = 0.05


class Keeper:
    """Restarts the daemons of a running cluster, each with the command of `psctl up`.

    A context manager; after its end nothing is restarted. Stopped daemons (SIGSTOP) count as running."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._daemons = {daemon.name: daemon for daemon in record.load(cluster.state_dir)}
        self._started: list[subprocess.Popen[bytes]] = []
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
                for name, daemon in list(self._daemons.items()):
                    if _runs(daemon):
                        ended_at.pop(name, None)
                    elif now - ended_at.setdefault(name, now) >= RESTART_S:
                        self._start(name)
        except BaseException as failure:
            self.failure = failure

    def _start(self, name: str) -> None:
        state_dir = self._cluster.state_dir
        words = command(name, state_dir, master_address(state_dir), token_file(state_dir))
        with (state_dir / "logs" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words,
                cwd=daemon_dir(name, state_dir),
                env=self._cluster.environment | variables(name, ()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started = [other for other in self._started if other.poll() is None]  # collects those that ended
        self._started.append(process)
        created_s = psutil.Process(process.pid).create_time()
        self._daemons[name] = Daemon(name=name, pid=process.pid, created_s=created_s)
        record.save(state_dir, master_address(state_dir), tuple(self._daemons.values()))
        self.restarts.append((time.time(), name))


def _runs(daemon: Daemon) -> bool:
    try:
        process = psutil.Process(daemon.pid)
        same = abs(process.create_time() - daemon.created_s) < 0.5
        return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
