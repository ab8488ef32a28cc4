"""Growth of processes: memory, files, threads and mappings over time, and what a cluster holds when idle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness.cluster import LocalCluster
from harness.faults import Victim

WARM_UP_S = 12.0  # of a process's life, in which its growth is not judged
SPAN_S = 24.0  # a process that was sampled for less time is not judged
MOST_BYTES = 64 << 20
MOST_FILES = 24
MOST_THREADS = 12
MOST_MAPPINGS = 16  # of anonymous shared memory


@dataclass(frozen=True, kw_only=True)
class Look:
    """One process at one moment."""

    at_s: float
    resident_bytes: int
    files: int
    threads: int
    mappings: int


@dataclass
class Growth:
    """The samples of every process."""

    names: dict[tuple[int, float], str] = field(default_factory=dict)
    looks: dict[tuple[int, float], list[Look]] = field(default_factory=dict)

    def look(self, living: Iterable[Victim]) -> None:
        """Take a sample of each."""
        for victim in living:
            try:
                key = (victim.process.pid, victim.process.create_time())
                age_s = time.time() - key[1]
                if age_s >= WARM_UP_S and victim.process.status() != psutil.STATUS_STOPPED:
                    self.names[key] = victim.name
                    self.looks.setdefault(key, []).append(look_at(victim.process))
            except (psutil.Error, OSError):
                continue  # it has ended meanwhile

    def violations(self) -> list[str]:
        """What grew beyond its bound: medians of the first and the last third of a process's samples compared."""
        found = []
        for key, looks in self.looks.items():
            if looks[-1].at_s - looks[0].at_s < SPAN_S or len(looks) < 6:
                continue
            for what, most in (
                ("resident_bytes", MOST_BYTES),
                ("files", MOST_FILES),
                ("threads", MOST_THREADS),
                ("mappings", MOST_MAPPINGS),
            ):
                first, last = ends(looks, what)
                if last - first > most:
                    found.append(f"{self.names[key]} (pid {key[0]}): {what} grew from {first:.0f} to {last:.0f}")
        return found

    def worst(self) -> dict[str, float]:
        """The largest growth of any process that was sampled for long enough."""
        judged = [looks for looks in self.looks.values() if looks[-1].at_s - looks[0].at_s >= SPAN_S and len(looks) > 5]
        return {
            what: max((ends(looks, what)[1] - ends(looks, what)[0] for looks in judged), default=0.0)
            for what in ("resident_bytes", "files", "threads", "mappings")
        }


def ends(looks: list[Look], what: str) -> tuple[float, float]:
    """Medians of the first and the last third."""
    third = max(1, len(looks) // 3)
    values = [float(getattr(look, what)) for look in looks]
    return statistics.median(values[:third]), statistics.median(values[-third:])


def look_at(process: psutil.Process) -> Look:
    """A sample of a process. Raises psutil.Error or OSError when it is gone."""
    with process.oneshot():
        return Look(
            at_s=time.time(),
            resident_bytes=process.memory_info().rss,
            files=process.num_fds(),
            threads=process.num_threads(),
            mappings=Path(f"/proc/{process.pid}/maps").read_text().count("memfd:"),
        )


def left_by_jobs(cluster: LocalCluster) -> list[str]:
    """What agents still hold of jobs: processes, directories of sockets, scratch directories. Nothing when no job
    runs."""
    found = []
    for name, daemon in cluster.daemons().items():
        found += [f"{name} still runs {child.pid} {child.cmdline()}" for child in daemon.children()]
        for directory in cluster.directories_of(name) if name != "master" else ():
            if directory.is_dir():
                found += [str(path) for path in directory.iterdir()]
    return found
