"""The gate and the sums of one step: which gradients count, and the memory behind them.

Per bucket a partition holds disjoint nodes of the gradient tree. An arriving node whose self or ancestor is held is a
duplicate. Otherwise it replaces the descendants that it covers, and siblings combine. Hence any worker may compute any
shard, as often as it likes: what is in the root was added once, in the tree's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch

from pscluster.step.layout import BLOCK_WORDS
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


T = TypeVar("T")


def _nothing() -> None:
    """The memory needs no release."""


@dataclass
class Entry(Generic[T]):
    """A held node. `release` is called once, when its memory may be used again."""

    value: T
    release: Callable[[], None] = _nothing


@dataclass
class Sums(Generic[T]):
    """The nodes of one bucket (or summary) of the open step.

    `add(left, right, parent)` gives the parent node's value in left's memory, or raises before it has changed any."""

    tree: Tree
    add: Callable[[T, T, TreeNode], T]
    _held: Held = NOTHING
    _entries: dict[TreeNode, Entry[T]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the root is there: every microbatch of the step is in, once."""
        return self.tree.root in self._held

    @property
    def root(self) -> T:
        """The sum over all microbatches; only when complete."""
        return self._entries[self.tree.root].value

    def holds(self, node: TreeNode) -> bool:
        """Whether an arriving node would be a duplicate."""
        return admit(self.tree, self._held, node).duplicate

    def offer(self, node: TreeNode, entry: Entry[T]) -> bool:
        """Take a node, which is owned from here on. False: a duplicate, released at once."""
        admission = admit(self.tree, self._held, node)
        if admission.duplicate:
            entry.release()
            return False
        entries = {**self._entries, node: entry}
        dropped = [entries.pop(covered) for covered in admission.covered]
        for merge in admission.merges:
            left, right = entries.pop(merge.left), entries.pop(merge.right)
            entries[merge.parent] = Entry(self.add(left.value, right.value, merge.parent), left.release)
            dropped.append(right)
        self._entries, self._held = entries, admission.held  # an `add` that refuses leaves everything as it was
        for gone in dropped:  # a release may send what is open now: only after the sums are set
            gone.release()
        return True

    def take_root(self) -> Entry[T]:
        """The root, owned and to be released by the caller from here on; the next step begins empty."""
        self._held = NOTHING
        return self._entries.pop(self.tree.root)


class Pool:
    """Reused memory for arriving nodes, by length, so that no step pays for the first touch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._free: dict[int, list[torch.Tensor]] = {}
        self.allocated_bytes = 0

    def take(self, num_words: int) -> torch.Tensor:
        """A tensor of this length with any content; owned by the caller until `give`."""
        stack = self._free.get(num_words)
        if stack:
            return stack.pop()
        self.allocated_bytes += self.dtype.itemsize * num_words
        return torch.zeros(num_words, dtype=self.dtype)

    def give(self, tensor: torch.Tensor) -> None:
        self._free.setdefault(tensor.numel(), []).append(tensor)


_scratch = torch.empty(BLOCK_WORDS, dtype=torch.float64)


def block_squares(root: torch.Tensor, first_block: int, right: torch.Tensor | None = None) -> dict[int, float]:
    """Sum of squares of each block of a complete sum, in float64, by global block number.

    With `right`, the sum is completed first, root += right, block by block while each is in cache.
    One thread, one scratch buffer of a fixed alignment: equal words give equal bits."""
    squares: dict[int, float] = {}
    for number, start in enumerate(range(0, root.numel(), BLOCK_WORDS)):
        block = root[start : start + BLOCK_WORDS]
        if right is not None:
            block.add_(right[start : start + BLOCK_WORDS])
        wide = _scratch[: block.numel()]
        wide.copy_(block)
        squares[first_block + number] = float(torch.dot(wide, wide))
    return squares
