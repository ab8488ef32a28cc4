"""The product's master, patched to kill itself at a named point around a write.

    python -m harness.failing_master POINT COUNT MARK FLAG...

It is `psmaster FLAG...` until the point is reached for the COUNT-th time; then the file MARK is written and the process
kills itself with SIGKILL, so that nothing after that point happens.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.cluster import LocalCluster
from pscluster.cli.local.processes import command, daemon_dir
from pscluster.settings import master_address, token_file
from psmaster import daemon
from psmaster.storage.logs import ProcessLog
from psmaster.storage.metrics_file import MetricsFile
from psmaster.storage.persistence import Archive
from psmaster.storage.sqlite import SqliteStore

# Each point is before or after a call of a method, in the order of one transaction's write.
POINTS: dict[str, tuple[str, type, str]] = {
    "before anything": ("before", Archive, "save"),
    "metrics not yet written": ("before", MetricsFile, "append"),
    "metrics written": ("after", MetricsFile, "append"),
    "logs written": ("after", ProcessLog, "append"),
    "before the transaction": ("before", SqliteStore, "write"),
    "in the transaction": ("before", SqliteStore, "_write_events"),
    "before its commit": ("after", SqliteStore, "_write_events"),
    "committed": ("after", SqliteStore, "write"),
    "metrics not yet cut": ("before", MetricsFile, "cut"),
    "metrics cut": ("after", MetricsFile, "cut"),
    "before any reply": ("after", Archive, "save"),
}


started: list[subprocess.Popen[bytes]] = []
"""All processes that `start` has started."""


class Trap:
    """Counts, and kills the process that it is in."""

    def __init__(self, count: int, mark: Path) -> None:
        self._left = count
        self._mark = mark

    def spring(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._mark.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)


def set_trap(point: str, trap: Trap) -> None:
    """Wrap the method that the point names."""
    when, owner, name = POINTS[point]
    method: Callable[..., Any] = getattr(owner, name)

    def trapped(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            trap.spring()
        result = method(*arguments, **named)
        if when == "after":
            trap.spring()
        return result

    setattr(owner, name, trapped)


def start(cluster: LocalCluster, point: str, count: int, mark: Path) -> subprocess.Popen[bytes]:
    """Start it in place of a cluster's master, which must have ended."""
    state_dir = cluster.state_dir
    words = command("master", state_dir, master_address(state_dir), token_file(state_dir))
    flags = words[words.index("psmaster.daemon") + 1 :]
    with (state_dir / "logs" / "master.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.failing_master", point, str(count), str(mark), *flags],
            cwd=daemon_dir("master", state_dir),
            env=cluster.environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    started.append(process)
    return process


def main() -> int:
    point, count, mark, *flags = sys.argv[1:]
    set_trap(point, Trap(int(count), Path(mark)))
    return daemon.run(flags)


if __name__ == "__main__":
    sys.exit(main())
