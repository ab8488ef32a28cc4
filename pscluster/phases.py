"""Wall-clock time by phase, which trainers and partitions export as ps_phase_seconds_total."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Phases:
    """Wall-clock seconds by phase since the start. One thread measures; any may read `seconds`."""

    def __init__(self, names: Iterable[str]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self._inner_s = 0.0  # spent in phases inside the running one

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the block as part of a phase; a phase within a phase counts as the inner one alone."""
        outer, self._inner_s = self._inner_s, 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] += spent - self._inner_s
            self._inner_s = outer + spent
