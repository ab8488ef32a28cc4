"""The open stream of one agent, as the master writes to it: the newest assignment and the newest acknowledgement, which
answers beats, too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from pscluster.v1 import agents_pb2


class AgentStream:
    """Belongs to the master's loop. What waits to be sent is bounded: newer replaces older."""

    def __init__(self, node_id: str, incarnation: str) -> None:
        self.node_id = node_id
        self.incarnation = incarnation
        self.sent: tuple[object, ...] | None = None
        """What the newest assignment handed to this stream names: nodes, process ids, plans; None before the first."""
        self.closed = False
        self._assignment: agents_pb2.Assignment | None = None
        self._sequence = 0
        self._acknowledged = 0
        self._beaten = False
        self._news = asyncio.Event()

    def assign(self, assignment: agents_pb2.Assignment) -> None:
        """Send this next. Never blocks."""
        self._assignment = assignment
        self._news.set()

    def acknowledge(self, sequence: int) -> None:
        """Send that everything up to `sequence` is stored. Never blocks."""
        self._sequence = max(self._sequence, sequence)
        self._news.set()

    def answer(self) -> None:
        """Let the agent hear something after its beat: a network may carry its words and not ours. Never blocks."""
        self._beaten = True
        self._news.set()

    def close(self) -> None:
        """End the stream. Safe to repeat."""
        self.closed = True
        self._news.set()

    async def messages(self) -> AsyncIterator[agents_pb2.MasterMessage]:
        """What to send, until the stream is closed."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self.closed:
                return
            if self._assignment is not None:
                assignment, self._assignment = self._assignment, None
                yield agents_pb2.MasterMessage(assignment=assignment)
            if self._sequence > self._acknowledged or self._beaten:
                self._acknowledged, self._beaten = self._sequence, False
                yield agents_pb2.MasterMessage(ack=agents_pb2.Acknowledged(sequence=self._acknowledged))
