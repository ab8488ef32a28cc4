"""Accepted connections whose peers have not identified themselves yet: few, and none for long."""

from __future__ import annotations

import time

from pscluster.errors import FrameError
from pscluster.wire.connection import Connection

MAX_NEWCOMERS = 512
"""How many at once. A handshake of TLS that stops in the middle holds some 50 KB; the peers of a job identify
themselves within milliseconds, and one that was closed among too many dials again."""


class Newcomers:
    """Of one listener, in the order in which they came. Each has `patience_s` to set its `Connection.context`."""

    def __init__(self, patience_s: float, limit: int = MAX_NEWCOMERS) -> None:
        self._patience_s = patience_s
        self._limit = limit
        self._came_s: dict[Connection, float] = {}  # monotonic

    def __len__(self) -> int:
        return len(self._came_s)

    def add(self, connection: Connection) -> None:
        """The oldest one is closed where there are too many."""
        self._came_s[connection] = time.monotonic()
        if len(self._came_s) > self._limit:
            self._forget_known()
        if len(self._came_s) > self._limit:
            oldest = next(iter(self._came_s))
            del self._came_s[oldest]
            what = f"{self._limit} connections without a HELLO: the oldest is closed for a new one"
            oldest.close(FrameError(what, details={"field": "handshake", "reason": "crowded"}))

    def close_late(self) -> None:
        """Close those whose time is up."""
        self._forget_known()
        before_s = time.monotonic() - self._patience_s
        late = [connection for connection, came_s in self._came_s.items() if came_s <= before_s]
        for connection in late:
            self._came_s.pop(connection, None)
            connection.close(FrameError("a connection without a HELLO", details={"field": "handshake"}))

    def next_s(self) -> float:
        """In how many seconds `close_late` is due, of those that are there and those to come."""
        came_s = next(iter(self._came_s.values()), None)
        return self._patience_s if came_s is None else max(0.0, came_s + self._patience_s - time.monotonic())

    def _forget_known(self) -> None:
        known = [connection for connection in self._came_s if connection.context is not None or not connection.is_open]
        for connection in known:
            del self._came_s[connection]
