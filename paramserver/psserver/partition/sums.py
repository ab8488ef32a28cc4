"""Sums of one step: nodes admitted by the gate, with the memory behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from pscluster.layout import BLOCK_WORDS
from pscluster.tree import Node, Tree
from psserver.partition.gate import NOTHING, Held, admit, is_complete

T = TypeVar("T")


@dataclass
class Entry(Generic[T]):
    """A held node. `owner` sent it, and gets `size_bytes` of credit back when its memory is free again."""

    value: T
    owner: object
    size_bytes: int


@dataclass
class Sums(Generic[T]):
    """The nodes of one bucket (or summary) of the open step.

    `add(left, right)` gives the parent in left's memory, or raises before it has changed any; `free` takes back what
    is dropped; `credit(owner, size_bytes)` hears of memory that is free again."""

    tree: Tree
    add: Callable[[T, T], T]
    free: Callable[[T], None]
    credit: Callable[[object, int], None]
    _held: Held = NOTHING
    _entries: dict[Node, Entry[T]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return is_complete(self.tree, self._held)

    @property
    def root(self) -> T:
        """The sum over all microbatches; only when complete."""
        return self._entries[self.tree.root].value

    def holds(self, node: Node) -> bool:
        """Whether an arriving node would be a duplicate."""
        return admit(self.tree, self._held, node).duplicate

    def offer(self, node: Node, entry: Entry[T]) -> bool:
        """Take a node, which is owned from here on. False: a duplicate, freed at once."""
        admission = admit(self.tree, self._held, node)
        if admission.duplicate:
            self._drop(entry)
            return False
        entries = {**self._entries, node: entry}
        dropped = [entries.pop(covered) for covered in admission.covered]
        for merge in admission.merges:
            left, right = entries.pop(merge.left), entries.pop(merge.right)
            value = self.add(left.value, right.value)
            entries[merge.parent] = Entry(value, left.owner, left.size_bytes)
            dropped.append(right)
        self._entries, self._held = entries, admission.held  # an `add` that refuses leaves everything as it was
        for gone in dropped:  # credit says what is open now: only after the bucket is what it is
            self._drop(gone)
        return True

    def take_root(self) -> T:
        """The root, owned by the caller from here on; the next step begins empty."""
        entry = self._entries.pop(self.tree.root)
        self._held = NOTHING
        self.credit(entry.owner, entry.size_bytes)
        return entry.value

    def clear(self) -> None:
        """Forget everything that is held."""
        dropped, self._entries, self._held = self._entries, {}, NOTHING
        for entry in dropped.values():
            self._drop(entry)

    def _drop(self, entry: Entry[T]) -> None:
        self.free(entry.value)
        self.credit(entry.owner, entry.size_bytes)


class Pool:
    """Reused fp32 memory for arriving nodes, by length, so that no step pays for the first touch."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self.allocated_bytes = 0

    def take(self, num_words: int) -> torch.Tensor:
        """An fp32 tensor of this length with any content; owned by the caller until `give`."""
        stack = self._free.get(num_words)
        if stack:
            return stack.pop()
        self.allocated_bytes += 4 * num_words
        return torch.zeros(num_words)

    def give(self, tensor: torch.Tensor) -> None:
        self._free.setdefault(tensor.numel(), []).append(tensor)


_scratch = torch.empty(BLOCK_WORDS, dtype=torch.float64)


def block_squares(root: torch.Tensor, first_block: int) -> dict[int, float]:
    """Sum of squares of each block of a complete sum, in float64, by global block number.

    One thread, one scratch buffer of a fixed alignment: equal words give equal bits."""
    squares: dict[int, float] = {}
    for number, start in enumerate(range(0, root.numel(), BLOCK_WORDS)):
        block = root[start : start + BLOCK_WORDS]
        wide = _scratch[: block.numel()]
        wide.copy_(block)
        squares[first_block + number] = float(torch.dot(wide, wide))
    return squares
