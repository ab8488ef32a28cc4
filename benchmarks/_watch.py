"""CPU seconds and memory of running processes, measured from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import psutil

_CPU_INTERVAL_S = 0.05
_MEMORY_INTERVAL_S = 0.005


class Watch:
    """Calls each of `looks` every `interval_s`, on a thread of its own, until the end of the block."""

    def __init__(self, looks: Iterable[Callable[[], None]], interval_s: float) -> None:
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(look,), daemon=True) for look in looks]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, look: Callable[[], None]) -> None:
        while not self._ended.wait(self._interval_s):
            look()


class CpuSeries:
    """User and system seconds of `count` processes over time. `find` names them, and is asked until they have all
    started: it may read the whole process table, which is nothing to do while something else is measured."""

    def __init__(self, find: Callable[[], Iterable[psutil.Process]], count: int) -> None:
        self._find = find
        self._count = count
        self._seen: dict[int, psutil.Process] = {}
        self._series: dict[int, list[tuple[float, float]]] = {}

    def watch(self) -> Watch:
        return Watch([self.look], _CPU_INTERVAL_S)

    def look(self) -> None:
        """Take one sample of each process."""
        if len(self._seen) < self._count:
            for process in self._find():
                self._seen.setdefault(process.pid, process)
        for pid, process in self._seen.items():
            try:
                spent = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            self._series.setdefault(pid, []).append((time.time(), spent.user + spent.system))

    def between(self, start_s: float, stop_s: float) -> float:
        """CPU seconds of all of them between two Unix times, by interpolation between the samples beside them."""
        total = 0.0
        for series in self._series.values():
            times, spent = np.array(series).T
            total += float(np.interp(stop_s, times, spent) - np.interp(start_s, times, spent))
        return total


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one process, in bytes, each page that several map divided among them: what it allocated, what it shares."""

    anonymous: int
    shared: int

    @property
    def total(self) -> int:
        return self.anonymous + self.shared


def memory_of(pid: int) -> Memory:
    """Pss_Anon and Pss_Shmem of smaps_rollup: all memory but the pages of files (programs, libraries)."""
    fields = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    found = {words[0]: int(words[1]) << 10 for words in fields}
    return Memory(anonymous=found["Pss_Anon:"], shared=found["Pss_Shmem:"])


class MemorySeries:
    """Memory of processes over time."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._series: dict[int, list[tuple[float, int]]] = {pid: [] for pid in pids}

    def watch(self) -> Watch:
        return Watch([partial(self.look, pid) for pid in self._series], _MEMORY_INTERVAL_S)

    def look(self, pid: int) -> None:
        """Take one sample of a process, if it is still there. Some 25 ms a GB, in the kernel."""
        try:
            self._series[pid].append((time.time(), memory_of(pid).total))
        except (ProcessLookupError, FileNotFoundError, KeyError):
            return  # it has ended: no memory is left

    def peak(self, pid: int, start_s: float = 0.0, stop_s: float = float("inf")) -> int:
        """The most bytes that a process was seen with between two Unix times. Raises ValueError without a sample."""
        return max(total for at, total in self._series[pid] if start_s <= at <= stop_s)
