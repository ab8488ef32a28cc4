"""A stream from the master that outlives the master: reopened, with growing pauses, until patience ends."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from pscluster.client.records import LogLine
from pscluster.errors import UnreachableError
from pscluster.rpc import error_of

STREAM_DEADLINE_S = 3600.0
"""A stream is reopened after this long, so that no call is without a deadline."""
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
OVERLAP_S = 30.0
"""Agents send what they kept during an outage late: this far back a reopened stream is read again."""
_Key = tuple[str, float, str, str]


@dataclass(frozen=True, kw_only=True)
class ReconnectingStream:
    """How a stream is kept. `on_absence(error, seconds)` is told of each try that failed and for how long the
    master has been away; `on_return()` once it answers again. Both run in the caller's thread."""

    patience_s: float = 600.0
    on_absence: Callable[[UnreachableError, float], None] = lambda _error, _seconds: None
    on_return: Callable[[], None] = lambda: None
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random

    def follow(
        self,
        open_stream: Callable[[], Any],
        finished: Callable[[], bool],
        expired: Callable[[], bool] = lambda: False,
    ) -> Iterator[Any]:
        """The messages of a stream, opened again whenever it breaks, or ends before `finished()` says so.

        Blocks between messages. A break after `expired()` ends it quietly. Raises UnreachableError once the
        master was away for `patience_s`, and at once whatever else the master answers.
        """
        outage: Outage | None = None
        while True:
            try:
                for message in self._messages(open_stream):
                    if outage is not None:
                        outage = None
                        self.on_return()
                    yield message
                if finished():
                    return
                error = UnreachableError("the master closed the stream")
            except UnreachableError as broken:
                error = broken
            if expired():
                return
            outage = self._bear(outage, error)

    def _messages(self, open_stream: Callable[[], Any]) -> Iterator[Any]:
        call = open_stream()
        try:
            yield from call
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        finally:
            call.cancel()

    def _bear(self, outage: Outage | None, error: UnreachableError) -> Outage:
        """Wait for the next try. A stream that only came to its own deadline is no absence worth telling."""
        now = self.monotonic()
        outage = outage or Outage(since_s=now)
        delay = next_delay_s(outage, now, self.patience_s, self.chance())
        if delay is None:
            raise error
        if error.details.get("grpc_code") != "DEADLINE_EXCEEDED":
            self.on_absence(error, now - outage.since_s)
        self.sleep(delay)
        return Outage(since_s=outage.since_s, attempts=outage.attempts + 1)


@dataclass(frozen=True, kw_only=True)
class Outage:
    """A master that has not answered since `since_s` (monotonic), after `attempts` tries."""

    since_s: float
    attempts: int = 0


def next_delay_s(outage: Outage, now_s: float, patience_s: float, chance: float) -> float | None:
    """Seconds to wait before the next try, or None when patience is at an end.

    Doubles from FIRST_DELAY_S up to LONGEST_DELAY_S; `chance` in [0, 1) spreads each over its upper half, so
    that clients of a restarted master do not come all at once. Never waits past the end of patience.
    """
    left = outage.since_s + patience_s - now_s
    if left <= 0:
        return None
    delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(outage.attempts, 16))
    return min(left, delay * (0.5 + chance / 2))


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
