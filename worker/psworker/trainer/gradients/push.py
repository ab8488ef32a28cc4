"""What a trainer sends: gradients, buffers, summaries and statistics, each partition's part of it to each partition.

The main thread calls; every frame is posted to the reactor's thread, which enqueues it at its peers. A gradient is
written into memory that is shared with a partition on the same host, where there is a free lane; otherwise it is sent
from where autograd left it. `staging` takes it from a device first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from pscluster.job.spec import JobSpec
from pscluster.step.audit import AuditRole
from pscluster.step.codec import DTYPES, as_bytes
from pscluster.step.layout import Layout, Span
from pscluster.step.tree import Statistics, Summary, TreeNode
from pscluster.wire.frame import SUMMARY, UNCHANGED, Buffer, Codec, FrameKind, Header
from pscluster.wire.protocol import LeafDigest, Outcome, pack_statistics, pack_weight
from pscluster.wire.reactor import Reactor
from psworker.replica import BucketMemory
from psworker.staging import Staging
from psworker.tensor_words import flat_words
from psworker.trainer.gradients.accumulate import Gradients
from psworker.trainer.gradients.send_queue import Lane, SharedLanes
from psworker.trainer.peer import Peer
from psworker.trainer.work import Agenda, Work


class Part(NamedTuple):
    """What one partition gets of a frame: buffers that stay as they are until it has them, maybe in a shared lane."""

    partition: int
    buffers: Sequence[Buffer]
    lane: Lane | None = None


class Pusher:
    """The main thread's, but for `peers`, which the reactor's thread reads and sets."""

    def __init__(
        self, spec: JobSpec, layout: Layout, agenda: Agenda, lanes: SharedLanes, staging: Staging, reactor: Reactor
    ) -> None:
        self.peers: list[Peer] = []  # by partition
        self._layout = layout
        self._num_partitions = spec.servers.partitions
        self._codec = spec.network.push_codec
        self._agenda = agenda
        self._lanes = lanes
        self._staging = staging
        self._reactor = reactor

    def gradients(self, work: Work, bucket: int, node: TreeNode, gradients: Gradients) -> None:
        """Send every partition its part of a trained bucket's node. The gradients' memory must not be written again."""
        header = self._header(work, FrameKind.PUSH, bucket=bucket, node=node, codec=Codec.of(self._codec))
        pieces = gather(self._layout, bucket, gradients)
        parts = [self._part(pieces, index, span) for index, span in self._spans(bucket)]
        self._staging.after(lambda: self._send(self._order(bucket), header, parts), pieces)

    def words(self, work: Work, bucket: int, node: TreeNode, words: torch.Tensor) -> None:
        """Send every partition its part of an averaged or carried bucket's node."""
        data = words.cpu()
        header = self._header(work, FrameKind.PUSH, bucket=bucket, node=node)
        parts = [Part(i, [as_bytes(data[span.start : span.stop])]) for i, span in self._spans(bucket)]
        self._send(self._order(bucket), header, parts)

    def unchanged(self, work: Work, bucket: int, node: TreeNode, weight: float) -> None:
        """Report to every partition that a bucket of buffers did not change in this node of `weight`."""
        header = self._header(work, FrameKind.PUSH, bucket=bucket, node=node, flags=UNCHANGED)
        self._send(
            self._order(bucket), header, [Part(index, [pack_weight(weight)]) for index, _ in self._spans(bucket)]
        )

    def summary(self, work: Work, node: TreeNode, summary: Summary) -> None:
        """Send every partition a node of the step's summary."""
        header = self._header(work, FrameKind.PUSH, bucket=SUMMARY, node=node)
        body = summary.pack()
        self._send(len(self._layout.buckets), header, [Part(index, [body]) for index in range(self._num_partitions)])

    def statistics(self, work: Work, node: TreeNode, statistics: Statistics) -> None:
        """Send the coordinator a node of an evaluation."""
        header = self._header(work, FrameKind.STATISTICS, bucket=SUMMARY, node=node)
        self._send(0, header, [Part(0, [pack_statistics(statistics)])])

    def digest(self, work: Work, shard: int, role: AuditRole, digest: LeafDigest) -> None:
        """Send the coordinator the digest of an audited leaf: before anything else of its step that waits."""
        header = self._header(work, FrameKind.AUDIT, bucket=int(role), node=TreeNode(shard, 1))
        self._send(0, header, [Part(0, [digest.pack()])])

    def outcome(self, work: Work, outcome: Outcome) -> None:
        """Send the coordinator the finalised metrics, or the digest."""
        header = self._header(work, FrameKind.OUTCOME, bucket=SUMMARY, node=TreeNode(0, 1))
        self._send(1, header, [Part(0, [outcome.pack()])])

    def initial(self, work: Work, partitions: Sequence[int], memory: BucketMemory) -> None:
        """Send these partitions their first values, which are copied out of `memory`."""
        for bucket in self._layout.buckets:
            for index in partitions:
                span = self._layout.span(bucket.index, index, self._num_partitions)
                if span.num_words:
                    header = self._header(work, FrameKind.INIT, bucket=bucket.index, node=TreeNode(0, 1))
                    self._send(bucket.index, header, [Part(index, [bytes(as_bytes(memory.words(span)))])])

    def _send(self, order: int, header: Header, parts: Sequence[Part]) -> None:
        """Have the partitions get their parts; `order`: the frame's place in the sending order. From any thread."""
        self._reactor.post(lambda: self._enqueue(order, header, parts))

    def _enqueue(self, order: int, header: Header, parts: Sequence[Part]) -> None:
        """On the reactor's thread. What was computed before a restore is dropped."""
        plan = self._agenda.plan
        is_wanted = plan is not None and header.generation >= plan.restore_generation
        for part in parts:
            if is_wanted:
                self.peers[part.partition].pushes.enqueue(order, header, part.buffers, part.lane)
            elif part.lane is not None:
                part.lane.give_back()

    def _part(self, pieces: Pieces, index: int, span: Span) -> Part:
        """One partition's part of a bucket: in a lane that both share, or to be sent from where it lies."""
        dtype = DTYPES[self._codec]
        lane = self._lanes.take(index, span.bucket)
        if lane is None and self._staging.is_host:
            return Part(index, cut(pieces, span, dtype.itemsize))
        if lane is None:
            target = torch.empty(span.num_words, dtype=dtype, pin_memory=True)
        else:
            target = torch.frombuffer(lane.lanes.place(span.bucket, lane.number), dtype=dtype)
        write(pieces, span, target, self._staging.copy_out)
        return Part(index, [as_bytes(target)], lane)

    def _header(
        self, work: Work, kind: FrameKind, *, bucket: int = 0, node: TreeNode, flags: int = 0, codec: Codec = Codec.FP32
    ) -> Header:
        return Header(
            kind=kind, job=self._agenda.job, generation=work.generation, step=work.version, bucket=bucket, node=node,
            flags=flags, sender=self._agenda.rank, codec=codec,
        )  # fmt: skip

    def _spans(self, bucket: int) -> list[tuple[int, Span]]:
        """The partitions that hold words of a bucket, and which; every rank begins at another one."""
        count = self._num_partitions
        turned = [(self._agenda.rank + bucket + i) % count for i in range(count)]
        spans = [(index, self._layout.span(bucket, index, count)) for index in turned]
        return [(index, span) for index, span in spans if span.num_words]

    def _order(self, bucket: int) -> int:
        """The bucket's place in the sending order: backward gives the last one first."""
        return len(self._layout.buckets) - bucket


# ---- from the gradients of a bucket's tensors to the words of one partition ----

Pieces = list[tuple[int, int, torch.Tensor]]  # start word, stop word, words; what lies between is zeros


def gather(layout: Layout, bucket: int, gradients: Sequence[torch.Tensor | None]) -> Pieces:
    """Each gradient in its bucket, flat; the tensors share the gradients' memory where it is in the
    bucket's order."""
    pieces = []
    for placed, gradient in zip(layout.buckets[bucket].placed, gradients, strict=True):
        if gradient is not None and gradient.numel():
            flat = flat_words(layout.tensors[placed.tensor], gradient.detach())
            pieces.append((placed.offset, placed.offset + flat.numel(), flat))
    return pieces


def cut(pieces: Pieces, span: Span, item_bytes: int) -> list[Buffer]:
    """The span's words as buffers to send one after the other. They share the pieces' memory."""
    return [
        bytes(item_bytes * (high - low)) if words is None else as_bytes(words)
        for low, high, words in _within(pieces, span)
    ]


def write(
    pieces: Pieces, span: Span, target: torch.Tensor, copy: Callable[[torch.Tensor, torch.Tensor], object]
) -> None:
    """Have `copy(source, target)` copy the span's words to `target`, which is as long and may hold anything before."""
    for low, high, words in _within(pieces, span):
        if words is None:
            target[low:high].zero_()
        else:
            copy(words, target[low:high])


def _within(pieces: Pieces, span: Span) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """The whole span, in order, counted from its start: words, and None where zeros lie between the pieces."""
    at = span.start
    for first, last, words in pieces:
        low, high = max(first, span.start), min(last, span.stop)
        if low < high:
            if low > at:
                yield at - span.start, low - span.start, None
            yield low - span.start, high - span.start, words[low - first : high - first]
            at = high
    if span.stop > at:
        yield at - span.start, span.stop - span.start, None
