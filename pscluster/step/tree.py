"""The gradient tree: the order in which a step's D microbatch gradients are added.

The tree is binary and left-balanced (the shape of RFC 6962's Merkle tree): over n leaves the left child takes the
largest power of two below n. A node is named by its first leaf and its number of leaves. The tree depends on D
alone, so the order of every floating-point addition is the same in every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple


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
