"""A process's output on its way to the master: split into lines, bounded, losses counted."""

from __future__ import annotations

from collections import deque

from pscluster.v1.agents_pb2 import LogLine, LogLines

MAX_LINE_BYTES = 16 * 1024
MAX_BACKLOG_BYTES = 1024 * 1024
MAX_BACKLOG_LINES = 4_000
MAX_BATCH_BYTES = 256 * 1024
_LINE_OVERHEAD_BYTES = 64


class LineSplitter:
    """Splits a stream of bytes into lines of at most 16 KiB; holds at most one unfinished line.

    The rest of a longer line is dropped. Of a line that was overwritten by carriage returns (a progress bar)
    only the last state is kept, as on a terminal.
    """

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held = bytearray()

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes."""
        *complete, rest = data.split(b"\n")
        lines = []
        for piece in complete:
            self._hold(piece)
            lines.append(self._take())
        self._hold(rest)
        return lines

    def flush(self) -> list[str]:
        """The unfinished line, if any: the stream has ended."""
        return [self._take()] if self._held else []

    def _hold(self, piece: bytes) -> None:
        if b"\r" in piece.rstrip(b"\r"):
            self._held.clear()
            ending = piece[len(piece.rstrip(b"\r")) :]
            piece = piece.rstrip(b"\r").rpartition(b"\r")[2] + ending
        elif piece and self._held.endswith(b"\r"):
            self._held.clear()
        self._held += piece[: max(0, self._max_bytes - len(self._held))]

    def _take(self) -> str:
        line = bytes(self._held).rstrip(b"\r").decode("utf-8", "replace")
        self._held.clear()
        return line


class Backlog:
    """Lines of one process that wait to be sent; the oldest are dropped when it is full."""

    def __init__(self, max_bytes: int = MAX_BACKLOG_BYTES, max_lines: int = MAX_BACKLOG_LINES) -> None:
        self._max_bytes = max_bytes
        self._max_lines = max_lines
        self._lines: deque[LogLine] = deque()
        self._size_bytes = 0
        self._dropped = 0

    def __bool__(self) -> bool:
        return bool(self._lines or self._dropped)

    def add(self, line: LogLine) -> int:
        """Append `line`. Returns how many older lines were dropped for it."""
        self._lines.append(line)
        self._size_bytes += _size(line)
        before = self._dropped
        while self._size_bytes > self._max_bytes or len(self._lines) > self._max_lines:
            self._size_bytes -= _size(self._lines.popleft())
            self._dropped += 1
        return self._dropped - before

    def take(self, process_id: str, max_bytes: int = MAX_BATCH_BYTES) -> LogLines:
        """The oldest lines, up to about `max_bytes` of them, as one message; at least one if there is any."""
        batch = LogLines(process_id=process_id, dropped=self._dropped)
        self._dropped = 0
        taken = 0
        while self._lines and (taken == 0 or taken + _size(self._lines[0]) <= max_bytes):
            line = self._lines.popleft()
            taken += _size(line)
            batch.lines.append(line)
        self._size_bytes -= taken
        return batch


def _size(line: LogLine) -> int:
    return len(line.text) + _LINE_OVERHEAD_BYTES
