"""How fast this trainer computes: what the master deals shards by."""

from __future__ import annotations

import statistics
from collections import deque

RECENT_S = 2.0
AT_LEAST = 5  # the newest so many count, however old: microbatches may take longer than RECENT_S
AT_MOST = 64


class Speedometer:
    """Seconds that a microbatch takes, waiting left out: the median of recent ones. Not thread-safe; time is an
    argument."""

    def __init__(self) -> None:
        self._taken: deque[tuple[float, float]] = deque(maxlen=AT_MOST)  # (when it ended, seconds)
        self._version = -1
        self._is_first = True
        self.num_measured = 0

    def take(self, version: int, seconds: float, now_s: float) -> None:
        """A microbatch of `version` took so long and ended now. The very first one is not counted: it warms up.

        After a step in which this trainer had nothing to do, what it measured before is forgotten: the machine may have
        changed meanwhile."""
        if not self._version <= version <= self._version + 1:
            self._taken.clear()
        self._version = version
        if not self._is_first:
            self._taken.append((now_s, seconds))
            self.num_measured += 1
        self._is_first = False

    def microbatch_s(self, now_s: float) -> float:
        """The median; 0 when nothing was measured."""
        recent = [seconds for ended_s, seconds in self._taken if now_s - ended_s <= RECENT_S]
        if len(recent) < AT_LEAST:
            recent = [seconds for _, seconds in list(self._taken)[-AT_LEAST:]]
        return statistics.median(recent) if recent else 0.0
