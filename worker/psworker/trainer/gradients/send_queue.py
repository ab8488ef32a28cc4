"""A trainer's pending frames for one partition: in which order they are sent, again until acknowledged. Pure."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pscluster.wire.frame import Buffer, FrameKind, Header
from pscluster.wire.memory import Lanes
from psworker.trainer.gradients.lanes import Lane

Key = tuple[FrameKind, int, int, int, int]  # kind, step, bucket, node
UNKNOWN = 1 << 32  # above every bucket: until the partition reports which one is open, only credit admits


def key_of(header: Header) -> Key:
    """What an acknowledgement names."""
    return (header.kind, header.step, header.bucket, header.node.first, header.node.leaves)


@dataclass(order=True)
class PendingFrame:
    """One frame. `parts` stay alive and unchanged until it is acknowledged. `order`: its place in the sending order.

    With a `lane` the parts lie there, and while its lanes are the connection's a frame without a body is enough. They
    may change once that was sent: the partition has the node by then, and drops it as a duplicate if it is sent
    again."""

    order: tuple[int, int, int]
    header: Header = field(compare=False)
    parts: Sequence[Buffer] = field(compare=False)
    size_bytes: int = field(compare=False)
    lane: Lane | None = field(compare=False, default=None)


class SendQueue:
    """Frames for one partition, in sending order, within the credit that the partition granted.

    A node may be sent while its bytes fit the credit. Whatever the credit, it may when its bucket is the open one, the
    first in the sending order that the partition still waits for: what completes a bucket frees memory there. Or when
    its number is above that (the sending order falls): such a bucket is complete, or not one of gradients, or the
    summary, and takes no memory that counts. Hence the first frame in the order is either admitted, or not what the
    partition waits for."""

    def __init__(self) -> None:
        self._waiting: list[PendingFrame] = []
        self._in_flight: dict[Key, PendingFrame] = {}
        self._numbers = itertools.count()
        self.sent_bytes = 0
        self.granted_bytes = 0
        self.open_bucket = UNKNOWN  # -1: none
        self.lanes: Lanes | None = None  # shared over the connection that is there
        self._step = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._in_flight)

    def add(self, order: int, header: Header, parts: Sequence[Buffer], lane: Lane | None = None) -> None:
        """Queue a frame; `order` is the bucket's place in the sending order."""
        size = sum(memoryview(part).nbytes for part in parts)
        place = (header.step, order, next(self._numbers))
        heapq.heappush(self._waiting, PendingFrame(place, header, parts, size, lane))

    def is_shared(self, frame: PendingFrame) -> bool:
        """Whether the partition can read the frame's body where it lies."""
        return frame.lane is not None and frame.lane.lanes is self.lanes

    def next(self) -> PendingFrame | None:
        """The frame to send now, which is in flight from here on; None when nothing may be sent."""
        if not self._waiting:
            return None
        frame = self._waiting[0]
        counts = frame.header.kind is FrameKind.PUSH and frame.size_bytes > 0 and not self.is_shared(frame)
        fits = self.sent_bytes + frame.size_bytes <= self.granted_bytes
        if counts and not fits and frame.header.bucket < self.open_bucket:
            return None
        heapq.heappop(self._waiting)
        self._in_flight[key_of(frame.header)] = frame
        if counts:
            self.sent_bytes += frame.size_bytes
        return frame

    def acknowledged(self, key: Key) -> None:
        """The partition has the frame. Repeating this is harmless."""
        self._in_flight.pop(key, None)

    def reconnected(self, granted_bytes: int, open_bucket: int, lanes: Lanes | None = None) -> None:
        """A new connection, over which `lanes` are shared: nothing is in flight, the credit counts from zero."""
        self.lanes = lanes
        for frame in self._in_flight.values():
            heapq.heappush(self._waiting, frame)
        self._in_flight.clear()
        self.sent_bytes, self.granted_bytes, self.open_bucket = 0, granted_bytes, open_bucket

    def drop_before(self, step: int) -> None:
        """Forget what belongs to steps that are decided, and which bucket was open in them."""
        if step > self._step:
            self._step, self.open_bucket = step, UNKNOWN
        self._give_back(frame for frame in self._waiting if frame.header.step < step)
        self._waiting = [frame for frame in self._waiting if frame.header.step >= step]
        heapq.heapify(self._waiting)
        self._in_flight = {key: frame for key, frame in self._in_flight.items() if frame.header.step >= step}

    def _give_back(self, unsent: Iterable[PendingFrame]) -> None:
        for frame in unsent:
            if frame.lane is not None:
                frame.lane.give_back()
