"""What a trainer sends: gradients, buffers, summaries and statistics, each partition's part of it to each partition.

The main thread pushes; every frame is handed to the reactor's thread, which owes it to the peer in question until that
has it. A gradient is written into memory that is shared with a partition on the same host, where there is a free lane;
it is sent from where autograd left it otherwise; `staging` takes it from a device first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pscluster.job.spec import JobSpec
from pscluster.step.codec import DTYPES, as_bytes
from pscluster.step.layout import Layout, Span
from pscluster.step.summary import Statistics, Summary
from pscluster.step.tree import TreeNode
from pscluster.wire.frame import SUMMARY, UNCHANGED, Buffer, Codec, FrameKind, Header
from pscluster.wire.memory import Lanes
from pscluster.wire.protocol import Outcome, pack_statistics, pack_weight
from psworker.staging import Staging
from psworker.trainer.gradients.gather import Gradients, Pieces, cut, gather, write
from psworker.trainer.gradients.send_queue import Lane
from psworker.trainer.values.bucket_memory import BucketMemory
from psworker.trainer.work import Work

NUM_LANES = 4  # nodes of one bucket that may lie in shared memory at a time; further ones go over the socket
NUM_PINNED_LANES = 1  # where all of them cost memory from the start


class Send(NamedTuple):
    """What one partition gets of a frame: buffers that stay as they are until it has them, maybe in a shared lane."""

    partition: int
    parts: Sequence[Buffer]
    lane: Lane | None = None


Owe = Callable[[int, Header, Sequence[Send]], None]
"""Have the partitions get a frame, by its place in the sending order. From any thread; never blocks."""


class Pushing:
    """The main thread's, but for `map_lanes` and `unmap_lanes`, which are the reactor's.

    `job` is the job's number in frames, `rank` the trainer's."""

    def __init__(self, spec: JobSpec, layout: Layout, job: int, rank: int, staging: Staging, enqueue: Owe) -> None:
        self._layout = layout
        self._num_partitions = spec.servers.partitions
        self._codec = spec.network.push_codec
        self._job = job
        self._rank = rank
        self._staging = staging
        self._owe = enqueue
        self._lock = threading.Lock()
        self.lanes: dict[int, Lanes] = {}  # by partition, under the lock: where gradients can be written

    # ---- the main thread ----

    def gradients(self, work: Work, bucket: int, node: TreeNode, gradients: Gradients) -> None:
        """Owe every partition its part of a trained bucket's node. The gradients belong to the exchange now."""
        header = self._header(work, FrameKind.PUSH, bucket=bucket, node=node, codec=Codec.of(self._codec))
        pieces = gather(self._layout, bucket, gradients)
        sends = [self._part(pieces, index, span) for index, span in self._holders(bucket)]
        self._staging.after(lambda: self._owe(self._order(bucket), header, sends), pieces)

    def words(self, work: Work, bucket: int, node: TreeNode, words: torch.Tensor) -> None:
        """Owe every partition its part of an averaged or carried bucket's node."""
        data = words.cpu()
        header = self._header(work, FrameKind.PUSH, bucket=bucket, node=node)
        sends = [Send(i, [as_bytes(data[span.start : span.stop])]) for i, span in self._holders(bucket)]
        self._owe(self._order(bucket), header, sends)

    def unchanged(self, work: Work, bucket: int, node: TreeNode, weight: float) -> None:
        """Owe every partition the word that a bucket of buffers did not move in this node of `weight`."""
        header = self._header(work, FrameKind.PUSH, bucket=bucket, node=node, flags=UNCHANGED)
        body = pack_weight(weight)
        self._owe(self._order(bucket), header, [Send(index, [body]) for index, _ in self._holders(bucket)])

    def summary(self, work: Work, node: TreeNode, summary: Summary) -> None:
        """Owe every partition a node of the step's summary."""
        header = self._header(work, FrameKind.PUSH, bucket=SUMMARY, node=node)
        body = summary.pack()
        self._owe(len(self._layout.buckets), header, [Send(index, [body]) for index in range(self._num_partitions)])

    def statistics(self, work: Work, node: TreeNode, statistics: Statistics) -> None:
        """Owe the coordinator a node of an evaluation."""
        header = self._header(work, FrameKind.STATISTICS, bucket=SUMMARY, node=node)
        self._owe(0, header, [Send(0, [pack_statistics(statistics)])])

    def outcome(self, work: Work, outcome: Outcome) -> None:
        """Owe the coordinator the finalised metrics, or the digest."""
        header = self._header(work, FrameKind.OUTCOME, bucket=SUMMARY, node=TreeNode(0, 1))
        self._owe(1, header, [Send(0, [outcome.pack()])])

    def initial(self, work: Work, partitions: Sequence[int], memory: BucketMemory) -> None:
        """Owe these partitions their first values, which are copied out of `memory`."""
        for bucket in self._layout.buckets:
            for index in partitions:
                span = self._layout.span(bucket.index, index, self._num_partitions)
                if span.num_words:
                    header = self._header(work, FrameKind.INIT, bucket=bucket.index, node=TreeNode(0, 1))
                    self._owe(bucket.index, header, [Send(index, [bytes(as_bytes(memory.words(span)))])])

    # ---- the reactor's thread ----

    @property
    def num_lanes(self) -> int:
        """How many lanes a partition is asked for."""
        return NUM_LANES if self._staging.is_host else NUM_PINNED_LANES

    def map_lanes(self, partition: int, fd: int, num_lanes: int) -> Lanes:
        """A partition shares memory from here on. Takes the descriptor."""
        spans = self._layout.spans(partition, self._num_partitions)
        lanes = Lanes.open(fd, self._layout.gradient_bytes(spans, self._codec), num_lanes)
        self._staging.pin(torch.frombuffer(lanes.view, dtype=torch.uint8))
        with self._lock:
            self.lanes[partition] = lanes
        return lanes

    def unmap_lanes(self, partition: int) -> None:
        """It no longer does."""
        with self._lock:
            self.lanes.pop(partition, None)

    # ---- parts ----

    def _part(self, pieces: Pieces, index: int, span: Span) -> Send:
        """One partition's part of a bucket: in a lane that both share, or to be sent from where it lies."""
        dtype = DTYPES[self._codec]
        lane = self._take_lane(index, span.bucket)
        if lane is None and self._staging.is_host:
            return Send(index, cut(pieces, span, dtype.itemsize))
        if lane is None:
            target = torch.empty(span.num_words, dtype=dtype, pin_memory=True)
        else:
            target = torch.frombuffer(lane.lanes.place(span.bucket, lane.number), dtype=dtype)
        write(pieces, span, target, self._staging.take_out)
        return Send(index, [as_bytes(target)], lane)

    def _take_lane(self, partition: int, bucket: int) -> Lane | None:
        with self._lock:
            lanes = self.lanes.get(partition)
        number = lanes.take(bucket) if lanes is not None else None
        return Lane(lanes, bucket, number) if lanes is not None and number is not None else None

    def _header(
        self, work: Work, kind: FrameKind, *, bucket: int = 0, node: TreeNode, flags: int = 0, codec: Codec = Codec.FP32
    ) -> Header:
        return Header(
            kind=kind, job=self._job, generation=work.generation, step=work.version, bucket=bucket, node=node,
            flags=flags, sender=self._rank, codec=codec,
        )  # fmt: skip

    def _holders(self, bucket: int) -> list[tuple[int, Span]]:
        """The partitions that hold words of a bucket; every rank begins at another one."""
        count = self._num_partitions
        turned = [(self._rank + bucket + i) % count for i in range(count)]
        spans = [(index, self._layout.span(bucket, index, count)) for index in turned]
        return [(index, span) for index, span in spans if span.num_words]

    def _order(self, bucket: int) -> int:
        """The bucket's place in the sending order: backward gives the last one first."""
        return len(self._layout.buckets) - bucket
