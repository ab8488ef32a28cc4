"""How long a trainer computes at a microbatch, its waiting for others left out: what tells a slow one from a stuck
one."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUM_REMEMBERED = 31  # microbatches of one kind, over which the median is taken


class ComputeTimer:
    """The main thread measures, any thread reads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._took: dict[str, deque[float]] = {}
        self._kind = ""  # of what is being computed; empty: nothing
        self._began_s = 0.0
        self._waited_s = 0.0  # of it
        self._waiting_since_s: float | None = None

    @contextmanager
    def computing(self, kind: str) -> Iterator[None]:
        """The block computes one thing of a kind: "train", "evaluate". What raises is not remembered."""
        with self._lock:
            self._kind, self._began_s, self._waited_s = kind, self._clock(), 0.0
        try:
            yield
            with self._lock:
                took = self._took.setdefault(kind, deque(maxlen=NUM_REMEMBERED))
                took.append(self._clock() - self._began_s - self._waited_s)
        finally:
            with self._lock:
                self._kind = ""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for others; it does not count as computing."""
        with self._lock:
            self._waiting_since_s = self._clock()
        try:
            yield
        finally:
            with self._lock:
                assert self._waiting_since_s is not None
                self._waited_s += self._clock() - self._waiting_since_s
                self._waiting_since_s = None

    def now(self) -> tuple[float, float]:
        """Seconds spent so far at what is computed now (0: nothing, or it waits), and the median of its kind (0: not
        known yet)."""
        with self._lock:
            if not self._kind or self._waiting_since_s is not None:
                return 0.0, 0.0
            return self._clock() - self._began_s - self._waited_s, self._median(self._kind)

    def last_s(self, kind: str) -> float:
        """The latest of a kind; 0: none was finished."""
        with self._lock:
            took = self._took.get(kind)
            return took[-1] if took else 0.0

    def typical_s(self, kind: str) -> float:
        """The median of the latest of a kind; 0: none was finished."""
        with self._lock:
            return self._median(kind)

    def _median(self, kind: str) -> float:
        took = self._took.get(kind)
        return statistics.median(took) if took else 0.0
