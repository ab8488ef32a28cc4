"""Where a reader of a job's log was when the stream broke, so that going on repeats no line and loses none."""

from __future__ import annotations

from collections import Counter, deque

from pscluster.client.records import LogLine

OVERLAP_S = 30.0
"""Agents send what they kept during an outage late: this far back a reopened stream is read again."""

_Key = tuple[str, float, str, str]


class LogCursor:
    """Remembers the lines of the last OVERLAP_S seconds (of log time) and drops their repetition. Bounded."""

    def __init__(self, since_s: float, most_lines: int = 100_000) -> None:
        self._since_s = since_s
        self._newest_s = 0.0
        self._recent: deque[_Key] = deque(maxlen=most_lines)
        self._repeats: Counter[_Key] = Counter()
        self.opened = 0

    def open(self) -> float:
        """Called when a stream is opened: the Unix time from which to ask for lines."""
        self.opened += 1
        if self.opened > 1:
            self._repeats = Counter(self._recent)
            return max(self._since_s, self._newest_s - OVERLAP_S)
        return self._since_s

    def is_new(self, line: LogLine) -> bool:
        """Whether `line` was not handed on before the last `open`."""
        key = (line.source, line.time_s, line.stream, line.text)
        if self._repeats[key] > 0:
            self._repeats[key] -= 1
            return False
        self._newest_s = max(self._newest_s, line.time_s)
        self._recent.append(key)
        while self._recent and self._recent[0][1] < self._newest_s - 2 * OVERLAP_S:
            self._recent.popleft()
        return True
