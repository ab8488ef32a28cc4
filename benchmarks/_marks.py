"""The records of a measured loop: the end of each step, and the CPU time used by then."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence


class Marks:
    """The steps of this process."""

    def __init__(self) -> None:
        self._ended_s: list[float] = []
        self._cpu_s: list[float] = []

    def mark(self) -> None:
        """A step has ended."""
        self._ended_s.append(time.perf_counter())
        self._cpu_s.append(time.process_time())

    def print_from(self, skip: int) -> None:
        """Print, as JSON, the median step and the CPU seconds of all steps after the first `skip` + 1."""
        measured = {"step_s": median_step_s(self._ended_s[skip:]), "cpu_s": self._cpu_s[-1] - self._cpu_s[skip]}
        print(json.dumps(measured), flush=True)


def median_step_s(ended_s: Sequence[float]) -> float:
    """Median seconds between the ends of steps that follow one another; at least two."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ended_s))
