"""A clock that goes on when a test says so."""

from __future__ import annotations


class Clock:
    """Stands in for the `time` module, or for one of its clocks."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    monotonic = perf_counter = __call__

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
