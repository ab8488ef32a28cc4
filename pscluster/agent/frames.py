"""Frames between an agent and a process it started: 4 bytes little-endian length, then a protobuf message."""

from __future__ import annotations

import struct

from pscluster.errors import FrameError

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 * 1024 * 1024


def encode(message: bytes) -> bytes:
    """One frame around a serialized message. Raises FrameError above 64 MiB."""
    if len(message) > MAX_FRAME_BYTES:
        raise FrameError(f"a control frame of {len(message)} bytes exceeds {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(message)) + message


class Splitter:
    """Cuts a byte stream into messages. Holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes, in order. Raises FrameError on a length above 64 MiB."""
        self._held += data
        messages = []
        start = 0
        while (end := self._end_of_frame(start)) is not None:
            messages.append(bytes(self._held[start + LENGTH.size : end]))
            start = end
        del self._held[:start]
        return messages

    def _end_of_frame(self, start: int) -> int | None:
        if len(self._held) - start < LENGTH.size:
            return None
        (size,) = LENGTH.unpack_from(self._held, start)
        if size > MAX_FRAME_BYTES:
            raise FrameError(f"a control frame announces {size} bytes, more than {MAX_FRAME_BYTES}")
        end = start + LENGTH.size + int(size)
        return end if end <= len(self._held) else None
