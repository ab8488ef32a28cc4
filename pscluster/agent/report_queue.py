"""Messages for the master, kept until it acknowledges them, and the output of a process on its way there.

Messages get sequence numbers and stay here, across any number of broken streams, until an acknowledgement covers them.
All must arrive, except a running process's status, of which only the newest is kept, so that a master that returns from
an outage does not act on a stale one; sequences therefore have gaps. In a long outage the oldest progress reports and
log lines are dropped first, and the loss is counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from pscluster.v1.agents_pb2 import AgentMessage, LogLine, LogLines, ProcessStatus

MAX_BYTES = 64 * 1024 * 1024
MAX_LINE_BYTES = 16 * 1024
MAX_BACKLOG_BYTES = 1024 * 1024
MAX_BACKLOG_LINES = 4_000
MAX_BATCH_BYTES = 256 * 1024
_LINE_OVERHEAD_BYTES = 64


class ReportQueue:
    """Not thread-safe; used from the agent's loop. Never blocks."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._queued: dict[int, AgentMessage] = {}
        self._latest_status: dict[str, int] = {}  # by process id: the queued status of the running process
        self._size_bytes = 0
        self.log_bytes = 0
        """Bytes of queued log lines: callers hold back further lines while this is high."""
        self.last_sequence = 0
        """The sequence of the newest message ever added; 0: none."""
        self.num_dropped = 0
        """Messages dropped because the queue was full."""

    def __len__(self) -> int:
        return len(self._queued)

    def add(self, message: AgentMessage) -> int:
        """Take ownership of `message` and queue it in place of the one it supersedes. Returns its sequence."""
        self.last_sequence += 1
        message.sequence = self.last_sequence
        if message.WhichOneof("body") == "status":
            self._remove_superseded(message.status)
        self._queued[self.last_sequence] = message
        self._account(message, 1)
        while self._size_bytes > self._max_bytes and len(self._queued) > 1:
            self._remove(next(self._drop_order()))
            self.num_dropped += 1
        return self.last_sequence

    def acknowledge(self, sequence: int) -> None:
        """Remove everything up to `sequence`. Safe to repeat."""
        while self._queued and (oldest := next(iter(self._queued))) <= sequence:
            self._remove(oldest)

    def after(self, sequence: int, limit: int) -> list[AgentMessage]:
        """At most `limit` messages above `sequence`, oldest first. They stay queued and must not be changed."""
        start = max(sequence + 1, next(iter(self._queued), self.last_sequence + 1))
        found = (self._queued.get(number) for number in range(start, self.last_sequence + 1))
        return list(islice((message for message in found if message is not None), limit))

    def _remove_superseded(self, status: ProcessStatus) -> None:
        """Remove the status that this one supersedes. An exit is the last status of a process."""
        earlier = self._latest_status.get(status.process_id)
        if earlier is not None:
            self._remove(earlier)
        if status.phase == ProcessStatus.PHASE_RUNNING:
            self._latest_status[status.process_id] = self.last_sequence

    def _drop_order(self) -> Iterator[int]:
        """Sequences in the order in which they are dropped; never the newest."""
        older = list(self._queued.items())[:-1]
        for droppable in (True, False):
            yield from (number for number, message in older if _is_droppable(message) == droppable)

    def _remove(self, sequence: int) -> None:
        message = self._queued.pop(sequence)
        self._account(message, -1)
        if self._latest_status.get(message.status.process_id) == sequence:
            del self._latest_status[message.status.process_id]

    def _account(self, message: AgentMessage, sign: int) -> None:
        size_bytes = message.ByteSize()
        self._size_bytes += sign * size_bytes
        if message.WhichOneof("body") == "log":
            self.log_bytes += sign * size_bytes


def _is_droppable(message: AgentMessage) -> bool:
    """Progress and output: losing them leaves a gap in a curve or log, and never harms the job."""
    if message.WhichOneof("body") == "log":
        return True
    return message.HasField("event") and message.event.report.WhichOneof("body") == "progress"


class LineSplitter:
    """Splits a stream of bytes into lines of at most 16 KiB, the rest of a longer one dropped. Of a line that was
    overwritten by carriage returns (a progress bar) only the last state is kept, as on a terminal."""

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
