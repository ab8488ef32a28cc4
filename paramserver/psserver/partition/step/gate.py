"""The gate: which gradients count, as a pure function of what is held.

Per bucket of the open step a partition holds a set of disjoint nodes of the gradient tree. An arriving node whose
self or ancestor is held is a duplicate. Otherwise it replaces the descendants that it covers, and siblings combine.
Hence any worker may compute any shard at any time and as often as it likes: what is in the root was added once, in
the tree's order.
"""

from __future__ import annotations

from typing import NamedTuple

from pscluster.step.tree import Merge, Tree, TreeNode

Held = frozenset[TreeNode]
NOTHING: Held = frozenset()


class Admission(NamedTuple):
    """What to do with a node: `duplicate`, or drop the `covered` nodes and carry out the `merges` in order."""

    held: Held
    duplicate: bool
    covered: tuple[TreeNode, ...]
    merges: tuple[Merge, ...]


def admit(tree: Tree, held: Held, node: TreeNode) -> Admission:
    """Judge an arriving node of the tree. Raises KeyError for what is no node of this tree."""
    if node not in tree:
        raise KeyError(node)
    if any(other.covers(node) for other in held):
        return Admission(held, True, (), ())
    covered = tuple(sorted(other for other in held if node.covers(other)))
    now = set(held).difference(covered) | {node}
    merges = []
    merge = tree.merge_of(node)
    while merge is not None and merge.left in now and merge.right in now:
        now -= {merge.left, merge.right}
        now.add(merge.parent)
        merges.append(merge)
        merge = tree.merge_of(merge.parent)
    return Admission(frozenset(now), False, covered, tuple(merges))


def is_complete(tree: Tree, held: Held) -> bool:
    """Whether the root is there: every microbatch of the step is in, once."""
    return tree.root in held
