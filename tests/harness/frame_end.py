"""What all connections without a socket have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pscluster.wire.frame import Buffer, Header


class FrameEnd:
    """One end of a connection; stands in for `pscluster.wire.connection.Connection`. Subclasses send and close."""

    def __init__(self, handler: Any, *, is_local: bool = False) -> None:
        self.handler = handler
        self.context: object = None
        self.is_open = True
        self.is_local = is_local
        self.identity = None  # there are no certificates
        self.wants_write = False
        self.sent_bytes = 0
        self.reading = True

    def detach(self, tag: object) -> None:
        """Bodies were copied when they were sent."""

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def take_fds(self) -> list[int]:
        return []

    def hand_over(self, header: Header, data: bytes) -> None:
        """Give a frame to the handler, as a `Connection` does. Raises what the handler raises."""
        body = memoryview(b"")
        if header.length:
            body = self.handler.body_target(self, header)
            assert body.nbytes == header.length
            body[:] = data
        self.handler.frame(self, header, body)


def joined(parts: Sequence[Buffer]) -> bytes:
    """A body in one piece."""
    return b"".join(bytes(memoryview(part).cast("B")) for part in parts if memoryview(part).nbytes)
