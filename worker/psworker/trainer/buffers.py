"""Buffers in the gradient tree: floating-point ones as weighted sums, the others from shard 0.

A node of an averaged bucket is either unchanged (no microbatch moved a buffer: only its weight counts) or fp32 words.
Unchanged + unchanged is unchanged with the weights added in float64; otherwise the unchanged side becomes
weight * committed value in fp32. The partition combines by the same rule, so that it does not matter who does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pscluster.tree import Node, Tree
from psworker.replica import Replica
from psworker.trainer.accumulate import Counter

Ready = list[tuple[int, Node, float, torch.Tensor | None]]  # bucket, node, weight, words (None: unchanged)


@dataclass
class BufferNode:
    """A node of one averaged bucket; `words` is None while nothing in it moved."""

    weight: float
    words: torch.Tensor | None
    committed: torch.Tensor

    def plus(self, right: BufferNode) -> BufferNode:
        """The parent; reuses this node's memory."""
        weight = self.weight + right.weight
        if self.words is None and right.words is None:
            return BufferNode(weight, None, self.committed)
        return BufferNode(weight, self.materialised().add_(right.materialised()), self.committed)

    def materialised(self) -> torch.Tensor:
        """The node as fp32 words."""
        return self.committed * self.weight if self.words is None else self.words


class BufferSums:
    """Carries the buffers of a run of microbatches up the tree."""

    def __init__(self, replica: Replica, tree: Tree) -> None:
        self._replica = replica
        buckets = replica.layout.buckets
        self._averaged = {
            b.index: Counter[BufferNode](tree, lambda left, right: left.plus(right))
            for b in buckets
            if b.kind == "averaged"
        }
        self._carried = [b.index for b in buckets if b.kind == "carried"]

    def begin_run(self, roots: list[Node]) -> None:
        """The next microbatches are the leaves of these nodes."""
        for counter in self._averaged.values():
            counter.begin(roots)

    def carry(self, shard: int, weight: float, moved: list[int]) -> Ready:
        """Take the live buffers after a microbatch of `weight` that moved the tensors numbered; give what is whole."""
        ready: Ready = []
        buckets_moved = {self._replica.layout.bucket_of[number][0] for number in moved}
        for bucket, counter in self._averaged.items():
            words = self._replica.weighted_buffers(bucket, weight) if bucket in buckets_moved else None
            leaf = BufferNode(weight, words, self._replica.flats[bucket])
            ready += [(bucket, node, whole.weight, whole.words) for node, whole in counter.carry(Node(shard, 1), leaf)]
        if shard == 0:
            for bucket in self._carried:
                words = self._replica.carried_words(bucket)
                same = torch.equal(words, self._replica.flats[bucket])
                ready.append((bucket, Node(0, 1), weight, None if same else words))
        return ready

    def flush(self) -> Ready:
        """Give up what is held, as nodes of their own."""
        return [
            (bucket, node, value.weight, value.words)
            for bucket, counter in self._averaged.items()
            for node, value in counter.flush()
        ]

    def abandon(self) -> None:
        """Forget what is held."""
        self.flush()
