"""The lanes that partitions on this host share with a trainer: where its gradients for them can be written."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from pscluster.job.spec import JobSpec
from pscluster.step.layout import Layout
from pscluster.wire.memory import Lanes
from psworker.staging import Staging

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
