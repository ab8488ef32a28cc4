"""Messages for the master, kept until it acknowledges them.

Durable messages get a sequence number that rises by 1. They stay here, across any number of broken streams, until an
acknowledgement covers them. Memory is bounded: in a long outage the oldest progress reports and log lines are dropped
first, and the loss is counted.

Every message must arrive, except the status of a running process: only the newest one is kept, so that a master that
returns from an outage does not act on a stale one. Sequences therefore have gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pscluster.v1.agents_pb2 import AgentMessage, ProcessStatus

MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class _Queued:
    message: AgentMessage
    size_bytes: int


class ReportQueue:
    """Not thread-safe; used from the agent's loop. Never blocks."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._queued: dict[int, _Queued] = {}
        self._latest_status: dict[str, int] = {}  # by process id: the queued status of the running process
        self._size_bytes = 0
        self._log_bytes = 0
        self.last_sequence = 0
        """The sequence of the newest message ever added; 0: none."""
        self.num_dropped = 0
        """Messages dropped because the queue was full."""

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def log_bytes(self) -> int:
        """Bytes of queued log lines: callers hold back further lines while this is high."""
        return self._log_bytes

    def add(self, message: AgentMessage) -> int:
        """Take ownership of `message` and queue it in place of the one it supersedes. Returns its sequence."""
        self.last_sequence += 1
        message.sequence = self.last_sequence
        if message.WhichOneof("body") == "status":
            self._remove_superseded(message.status)
        queued = _Queued(message=message, size_bytes=message.ByteSize())
        self._queued[self.last_sequence] = queued
        self._account(queued, 1)
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
        return [queued.message for queued in islice(filter(None, found), limit)]

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
        yield from (number for number, queued in older if _is_droppable(queued.message))
        yield from (number for number, queued in older if not _is_droppable(queued.message))

    def _remove(self, sequence: int) -> None:
        queued = self._queued.pop(sequence)
        self._account(queued, -1)
        process_id = queued.message.status.process_id
        if self._latest_status.get(process_id) == sequence:
            del self._latest_status[process_id]

    def _account(self, queued: _Queued, sign: int) -> None:
        self._size_bytes += sign * queued.size_bytes
        if queued.message.WhichOneof("body") == "log":
            self._log_bytes += sign * queued.size_bytes


def _is_droppable(message: AgentMessage) -> bool:
    """Progress and output: losing them leaves a gap in a curve or log, and never harms the job."""
    if message.WhichOneof("body") == "log":
        return True
    return message.HasField("event") and message.event.report.WhichOneof("body") == "progress"
