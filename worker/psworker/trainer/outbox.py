"""What a trainer still owes one partition: frames to send, in order, and to send again until acknowledged. Pure."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from pscluster.wire.frame import Buffer, Header, Kind

Key = tuple[Kind, int, int, int, int]  # kind, step, bucket, node
UNKNOWN = 1 << 32  # above every bucket: until the partition says which one is open, only credit admits


def key_of(header: Header) -> Key:
    """What an acknowledgement names."""
    return (header.kind, header.step, header.bucket, header.node.first, header.node.leaves)


@dataclass(order=True)
class Owed:
    """One frame. `parts` stay alive and unchanged until it is acknowledged. `rank`: place in the sending order."""

    rank: tuple[int, int, int]
    header: Header = field(compare=False)
    parts: Sequence[Buffer] = field(compare=False)
    size_bytes: int = field(compare=False)


class Outbox:
    """Frames for one partition, lowest rank first, within the credit that the partition granted.

    A node may be sent while its bytes fit the credit. Whatever the credit, it may when its bucket is the open one, the
    first in the sending order that the partition still waits for: what completes a bucket frees memory there. Or when
    its number is above that (the sending order falls): such a bucket is complete, or not one of gradients, or the
    summary, and takes no memory that counts. Hence the first frame in the order is either admitted, or not what the
    partition waits for."""

    def __init__(self) -> None:
        self._waiting: list[Owed] = []
        self._in_flight: dict[Key, Owed] = {}
        self._numbers = itertools.count()
        self.sent_bytes = 0
        self.granted_bytes = 0
        self.open_bucket = UNKNOWN  # -1: none
        self._step = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._in_flight)

    def add(self, order: int, header: Header, parts: Sequence[Buffer]) -> None:
        """Owe a frame; `order` is the bucket's place in the sending order."""
        size = sum(memoryview(part).nbytes for part in parts)
        heapq.heappush(self._waiting, Owed((header.step, order, next(self._numbers)), header, parts, size))

    def next(self) -> Owed | None:
        """The frame to send now, which is in flight from here on; None when nothing may be sent."""
        if not self._waiting:
            return None
        owed = self._waiting[0]
        counts = owed.header.kind is Kind.PUSH and owed.size_bytes > 0
        fits = self.sent_bytes + owed.size_bytes <= self.granted_bytes
        if counts and not fits and owed.header.bucket < self.open_bucket:
            return None
        heapq.heappop(self._waiting)
        self._in_flight[key_of(owed.header)] = owed
        if counts:
            self.sent_bytes += owed.size_bytes
        return owed

    def acknowledged(self, key: Key) -> None:
        """The partition has it. Repeating this is harmless."""
        self._in_flight.pop(key, None)

    def reconnected(self, granted_bytes: int, open_bucket: int) -> None:
        """A new connection: nothing is in flight, the credit counts from zero."""
        for owed in self._in_flight.values():
            heapq.heappush(self._waiting, owed)
        self._in_flight.clear()
        self.sent_bytes, self.granted_bytes, self.open_bucket = 0, granted_bytes, open_bucket

    def drop_before(self, step: int) -> None:
        """Forget what belongs to steps that are decided, and which bucket was open in them."""
        if step > self._step:
            self._step, self.open_bucket = step, UNKNOWN
        self._waiting = [owed for owed in self._waiting if owed.header.step >= step]
        heapq.heapify(self._waiting)
        self._in_flight = {key: owed for key, owed in self._in_flight.items() if owed.header.step >= step}

    def clear(self) -> None:
        """Forget everything: another timeline begins."""
        self._waiting.clear()
        self._in_flight.clear()
