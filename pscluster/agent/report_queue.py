"""What the master must learn, kept until it says that it has.

Durable messages get a sequence that rises by 1. They wait here, over any number of broken streams, until an
acknowledgement covers them. The memory they take is bounded: when the master stays away for too long, the oldest
progress reports and log lines go first, and the loss is counted.

Most of it is history, of which all must arrive. How a process looks while it runs is not: only the newest word on it is
kept, for a master that was away and hears an old one first would act on what is over. Sequences so have gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pscluster.v1.agents_pb2 import AgentMessage, ProcessStatus

MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class _Kept:
    message: AgentMessage
    size_bytes: int


class ReportQueue:
    """Not thread-safe; belongs to the agent's loop. Nothing here blocks."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[int, _Kept] = {}
        self._running: dict[str, int] = {}  # by process id: the kept message that says how it looks while it runs
        self._size_bytes = 0
        self._log_bytes = 0
        self.last_sequence = 0
        """Of the newest message ever added; 0: none."""
        self.num_dropped = 0
        """Messages given up for want of room."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def log_bytes(self) -> int:
        """How much of it is log lines: whoever adds them should wait while this is high."""
        return self._log_bytes

    def add(self, message: AgentMessage) -> int:
        """Take ownership of `message`, number it and keep it, instead of what it makes void. Returns its sequence."""
        self.last_sequence += 1
        message.sequence = self.last_sequence
        if message.WhichOneof("body") == "status":
            self._replace(message.status)
        kept = _Kept(message=message, size_bytes=message.ByteSize())
        self._kept[self.last_sequence] = kept
        self._account(kept, 1)
        while self._size_bytes > self._max_bytes and len(self._kept) > 1:
            self._forget(next(self._least_needed()))
            self.num_dropped += 1
        return self.last_sequence

    def acknowledge(self, sequence: int) -> None:
        """Forget everything up to `sequence`. Safe to repeat."""
        while self._kept and (oldest := next(iter(self._kept))) <= sequence:
            self._forget(oldest)

    def after(self, sequence: int, limit: int) -> list[AgentMessage]:
        """At most `limit` messages above `sequence`, oldest first. They stay here and must not be changed."""
        start = max(sequence + 1, next(iter(self._kept), self.last_sequence + 1))
        found = (self._kept.get(number) for number in range(start, self.last_sequence + 1))
        return [kept.message for kept in islice(filter(None, found), limit)]

    def _replace(self, status: ProcessStatus) -> None:
        """Forget what an earlier status said of the process while it ran. An exit is never followed by another word."""
        earlier = self._running.get(status.process_id)
        if earlier is not None:
            self._forget(earlier)
        if status.phase == ProcessStatus.PHASE_RUNNING:
            self._running[status.process_id] = self.last_sequence

    def _least_needed(self) -> Iterator[int]:
        """Sequences in the order in which to give them up; never the newest."""
        older = list(self._kept.items())[:-1]
        yield from (number for number, kept in older if _expendable(kept.message))
        yield from (number for number, kept in older if not _expendable(kept.message))

    def _forget(self, sequence: int) -> None:
        kept = self._kept.pop(sequence)
        self._account(kept, -1)
        process_id = kept.message.status.process_id
        if self._running.get(process_id) == sequence:
            del self._running[process_id]

    def _account(self, kept: _Kept, sign: int) -> None:
        self._size_bytes += sign * kept.size_bytes
        if kept.message.WhichOneof("body") == "log":
            self._log_bytes += sign * kept.size_bytes


def _expendable(message: AgentMessage) -> bool:
    """Progress and output: a gap in them costs a curve or a log, never the job."""
    if message.WhichOneof("body") == "log":
        return True
    return message.HasField("event") and message.event.report.WhichOneof("body") == "progress"
