"""Buffers in the gradient tree: floating-point ones as weighted sums, the others from shard 0."""

from __future__ import annotations

from functools import partial

import torch

from pscluster.step.codec import BufferNode
from pscluster.step.tree import Tree, TreeNode
from psworker.replica import Replica
from psworker.trainer.gradients.accumulate import Counter

Ready = list[tuple[int, TreeNode, float, torch.Tensor | None]]  # bucket, node, weight, words (None: unchanged)


class BufferSums:
    """Carries the buffers of a run of microbatches up the tree."""

    def __init__(self, replica: Replica, tree: Tree) -> None:
        self._replica = replica
        buckets = replica.layout.buckets
        self._averaged = {
            b.index: Counter[BufferNode](tree, partial(_plus, replica.flats[b.index]))
            for b in buckets
            if b.kind == "averaged"
        }
        self._carried = [b.index for b in buckets if b.kind == "carried"]

    def begin_run(self, roots: list[TreeNode]) -> None:
        """The next microbatches are the leaves of these nodes."""
        for counter in self._averaged.values():
            counter.begin(roots)

    def carry(self, shard: int, weight: float, moved: list[int]) -> Ready:
        """Take the live buffers after a microbatch of `weight` that moved the tensors numbered; give what is whole."""
        ready: Ready = []
        buckets_moved = {self._replica.layout.bucket_of[number][0] for number in moved}
        for bucket, counter in self._averaged.items():
            words = self._replica.weighted_buffers(bucket, weight) if bucket in buckets_moved else None
            leaf = BufferNode(weight, words)
            ready += [
                (bucket, node, whole.weight, whole.words) for node, whole in counter.carry(TreeNode(shard, 1), leaf)
            ]
        if shard == 0:
            for bucket in self._carried:
                words = self._replica.carried_words(bucket)
                same = torch.equal(words, self._replica.flats[bucket])
                ready.append((bucket, TreeNode(0, 1), weight, None if same else words))
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


def _plus(committed: torch.Tensor, left: BufferNode, right: BufferNode) -> BufferNode:
    return left.plus(right, committed)
