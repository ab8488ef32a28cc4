"""The gradient tree: the order in which a step's D microbatch gradients, and the small values beside them, are added.

The tree is binary and left-balanced (the shape of RFC 6962's Merkle tree): over n leaves the left child takes the
largest power of two below n. A node is named by its first leaf and its number of leaves. The tree depends on D
alone, so the order of every floating-point addition is the same in every process.

The small values are in float64: a step's summary (loss, weight, samples, which tensors a microbatch touched) and an
evaluation's statistics (a vector of sums). Imports no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pscluster.errors import FrameError

_NUMBERS = struct.Struct("<ddd")


class TreeNode(NamedTuple):
    """A node of the tree: leaves first, first + 1, ... first + leaves - 1."""

    first: int
    leaves: int

    def covers(self, other: TreeNode) -> bool:
        """Whether `other` is this node or lies below it."""
        return self.first <= other.first and other.first + other.leaves <= self.first + self.leaves


class Merge(NamedTuple):
    """One addition: parent = left + right, in that order."""

    left: TreeNode
    right: TreeNode
    parent: TreeNode


class Tree:
    """The tree over `num_leaves` >= 1 leaves. Immutable; `tree_of` shares one per size."""

    def __init__(self, num_leaves: int) -> None:
        if num_leaves < 1:
            raise ValueError(f"a tree has at least one leaf, not {num_leaves}")
        self.root = TreeNode(0, num_leaves)
        self._merge_of: dict[TreeNode, Merge] = {}
        self._children: dict[TreeNode, tuple[TreeNode, TreeNode]] = {}
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            if node.leaves == 1:
                continue
            left_count = 1 << ((node.leaves - 1).bit_length() - 1)
            left = TreeNode(node.first, left_count)
            right = TreeNode(node.first + left_count, node.leaves - left_count)
            self._merge_of[left] = self._merge_of[right] = Merge(left, right, node)
            self._children[node] = (left, right)
            waiting += (left, right)

    def __contains__(self, node: TreeNode) -> bool:
        return node == self.root or node in self._merge_of

    def merge_of(self, node: TreeNode) -> Merge | None:
        """The addition that consumes `node`; None for the root. Raises KeyError for what is not a node of the tree."""
        return None if node == self.root else self._merge_of[node]

    def cover(self, leaves: Iterable[int]) -> list[TreeNode]:
        """The fewest nodes that together have exactly these leaves, by first leaf: the nodes that a worker pushes."""
        wanted = set(leaves)
        found: list[TreeNode] = []
        waiting = [self.root] if wanted else []
        while waiting:
            node = waiting.pop()
            have = sum(1 for leaf in range(node.first, node.first + node.leaves) if leaf in wanted)
            if have == node.leaves:
                found.append(node)
            elif have:
                waiting += reversed(self._children[node])
        return found


@lru_cache(maxsize=64)
def tree_of(num_leaves: int) -> Tree:
    """The tree over `num_leaves` leaves, shared."""
    return Tree(num_leaves)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The summary of one node of a step's tree. `touched`: one bit a tensor of the layout, lowest bit first."""

    loss_sum: float
    weight: float
    samples: float
    touched: bytes

    def pack(self) -> bytes:
        return _NUMBERS.pack(self.loss_sum, self.weight, self.samples) + self.touched

    @classmethod
    def unpack(cls, data: bytes | memoryview, num_tensors: int) -> Summary:
        """The inverse of `pack`. Raises FrameError for a wrong length."""
        if len(data) != summary_bytes(num_tensors):
            raise FrameError(f"a summary of {len(data)} bytes for {num_tensors} tensors", details={"field": "length"})
        loss_sum, weight, samples = _NUMBERS.unpack_from(data)
        return cls(loss_sum=loss_sum, weight=weight, samples=samples, touched=bytes(data[_NUMBERS.size :]))

    def plus(self, right: Summary) -> Summary:
        """The parent of this node and its right sibling."""
        return Summary(
            loss_sum=self.loss_sum + right.loss_sum,
            weight=self.weight + right.weight,
            samples=self.samples + right.samples,
            touched=bytes(a | b for a, b in zip(self.touched, right.touched, strict=True)),
        )

    def is_touched(self, tensor: int) -> bool:
        return bool(self.touched[tensor >> 3] >> (tensor & 7) & 1)


def summary_bytes(num_tensors: int) -> int:
    """Length of a packed summary."""
    return _NUMBERS.size + -(-num_tensors // 8)


def touched_bits(tensors: Iterable[int], num_tensors: int) -> bytes:
    """The bits of `Summary.touched` for the numbers of the touched tensors."""
    bits = bytearray(-(-num_tensors // 8))
    for tensor in tensors:
        bits[tensor >> 3] |= 1 << (tensor & 7)
    return bytes(bits)


Statistics = NDArray[np.float64]


def add_statistics(left: Statistics, right: Statistics) -> Statistics:
    """The parent of two nodes of an evaluation; an empty vector (a shard without a batch) adds nothing. Raises
    FrameError when they differ in length."""
    if not left.size or not right.size:
        return left if left.size else right
    if left.shape != right.shape:
        raise FrameError(f"evaluation statistics of {left.size} and {right.size} numbers do not add")
    return left + right
