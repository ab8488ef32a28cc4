"""The times of commits, to the millisecond: the coordinator writes the time into each step's record."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TAIL_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Commit:
    """`time_s` is a Unix time of this machine."""

    step: int
    time_s: float


class Commits:
    """Every recorded commit of a job, in order of time, including steps that a rollback made void.

    The record is the master's metrics.jsonl, which is up to a second late, and later while the master is down."""

    def __init__(self, state_dir: Path, job: str) -> None:
        self._path = state_dir / "master" / "jobs" / job / "metrics.jsonl"
        self._stamp: tuple[int, int] | None = None
        self.all: list[Commit] = []

    @property
    def newest_s(self) -> float:
        """Time of the newest commit; 0: none."""
        return self.all[-1].time_s if self.all else 0.0

    @property
    def step(self) -> int:
        """The newest committed step, which a rollback lowers."""
        return self.all[-1].step if self.all else 0

    @property
    def high_step(self) -> int:
        return max((commit.step for commit in self.all), default=0)

    def high_step_at(self, time_s: float) -> int:
        """The highest step that had been committed at a moment."""
        return max((commit.step for commit in self.all if commit.time_s <= time_s), default=0)

    def look(self) -> list[Commit]:
        """The commits that were recorded since the last call."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                stamp = (size, self._path.stat().st_mtime_ns)
                if stamp == self._stamp:
                    return []
                file.seek(max(0, size - _TAIL_BYTES))
                text = file.read()
        except FileNotFoundError:
            return []
        self._stamp = stamp
        new = [commit for commit in map(_commit, text.split(b"\n")) if commit and commit.time_s > self.newest_s]
        self.all += new
        return new

    def after(self, time_s: float) -> Commit | None:
        """The first commit after a moment."""
        return next((commit for commit in self.all if commit.time_s > time_s), None)


def _commit(line: bytes) -> Commit | None:
    """The commit of a line; None for an evaluation, or a line that is not yet complete."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return Commit(step=record["step"], time_s=record["time_s"]) if "time_s" in record else None


def median_step_s(commits: Sequence[Commit]) -> float:
    """Median seconds between commits that follow one another; at least two."""
    return statistics.median(later.time_s - earlier.time_s for earlier, later in itertools.pairwise(commits))


def recovery_s(commits: Sequence[Commit], fault_s: float, step_s: float) -> float:
    """The cost of a fault in seconds: from it to the next commit that needed a recovery, less a normal step.

    One step may still commit after a fault, when all its gradients had been delivered before: of the first two waits
    after the fault the longer one counts. Raises ValueError while there are no two commits after the fault."""
    times = [commit.time_s for commit in commits if commit.time_s > fault_s][:2]
    if len(times) < 2:
        raise ValueError(f"fewer than two commits after {fault_s}")
    first, second = times
    end = second if second - first > first - fault_s else first
    return max(0.0, end - fault_s - step_s)
