"""A trainer's pending frames for one partition: in which order they are sent, again until acknowledged; and the
lanes in shared memory where its gradients for a partition on this host can be written."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pscluster.job.spec import JobSpec
from pscluster.step.layout import Layout
from pscluster.wire.frame import Buffer, FrameKind, Header
from pscluster.wire.memory import Lanes
from psworker.staging import Staging

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
        for frame in self._waiting:
            if frame.header.step < step and frame.lane is not None:
                frame.lane.give_back()
        self._waiting = [frame for frame in self._waiting if frame.header.step >= step]
        heapq.heapify(self._waiting)
        self._in_flight = {key: frame for key, frame in self._in_flight.items() if frame.header.step >= step}


# ---- lanes ----


NUM_LANES = 4  # nodes of one bucket that may lie in shared memory at a time; further ones go over the socket
NUM_PINNED_LANES = 1  # where all of them cost memory from the start


@dataclass(frozen=True)
class Lane:
    """A place in shared memory that this trainer took and wrote to."""

    lanes: Lanes
    bucket: int
    number: int

    def give_back(self) -> None:
        """The partition is not going to read it: it may be written to again."""
        self.lanes.give_back(self.bucket, self.number)


class SharedLanes:
    """By partition. `take` is the main thread's, the rest the reactor's."""

    def __init__(self, spec: JobSpec, layout: Layout, staging: Staging) -> None:
        self.num_lanes = NUM_LANES if staging.is_host else NUM_PINNED_LANES  # that a partition is asked for
        self._layout = layout
        self._num_partitions = spec.servers.partitions
        self._codec = spec.network.push_codec
        self._staging = staging
        self._lock = threading.Lock()
        self._lanes: dict[int, Lanes] = {}

    def map(self, partition: int, fd: int, num_lanes: int) -> Lanes:
        """A partition shares memory from here on; takes over `fd`. Raises FrameError."""
        spans = self._layout.spans(partition, self._num_partitions)
        lanes = Lanes.open(fd, self._layout.gradient_bytes(spans, self._codec), num_lanes)
        self._staging.pin(torch.frombuffer(lanes.view, dtype=torch.uint8))
        with self._lock:
            self._lanes[partition] = lanes
        return lanes

    def unmap(self, partition: int) -> None:
        """It no longer does."""
        with self._lock:
            self._lanes.pop(partition, None)

    def take(self, partition: int, bucket: int) -> Lane | None:
        """A free lane of a bucket; None: there is none."""
        with self._lock:
            lanes = self._lanes.get(partition)
        number = lanes.take(bucket) if lanes is not None else None
        return Lane(lanes, bucket, number) if lanes is not None and number is not None else None
