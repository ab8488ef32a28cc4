"""A stream from the master that outlives the master: reopened, with growing pauses, until patience ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from pscluster.client.patience import Outage, next_delay_s
from pscluster.errors import UnreachableError
from pscluster.rpc import error_of

STREAM_DEADLINE_S = 3600.0
"""A stream is reopened after this long, so that no call is without a deadline."""


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
