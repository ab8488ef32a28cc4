"""The gate: what counts is in the root once, in the tree's order, whatever arrives and however often."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pscluster.errors import FrameError
from pscluster.step.layout import BLOCK_WORDS
from pscluster.step.tree import Statistics, Tree, TreeNode, add_statistics, tree_of
from psserver.partition.step.sums import NOTHING, Entry, Held, Pool, Sums, admit, block_squares


def nodes_of(tree: Tree) -> list[TreeNode]:
    """Every node of a tree."""
    found = {TreeNode(leaf, 1) for leaf in range(tree.root.leaves)}
    for leaf in sorted(found):
        merge = tree.merge_of(leaf)
        while merge is not None:
            found.add(merge.parent)
            merge = tree.merge_of(merge.parent)
    return sorted(found)


def canonical(node: TreeNode) -> str:
    """The only right sum of a node's leaves: RFC 6962's shape, written out without `Tree`."""
    if node.leaves == 1:
        return str(node.first)
    left = 1
    while 2 * left < node.leaves:
        left *= 2
    return f"({canonical(TreeNode(node.first, left))}+{canonical(TreeNode(node.first + left, node.leaves - left))})"


def reachable(tree: Tree, on_step: Callable[[Held, TreeNode], None]) -> set[Held]:
    """Every set that can be held, over all orders in which the tree's nodes may arrive any number of times."""
    seen, waiting = {NOTHING}, [NOTHING]
    while waiting:
        held = waiting.pop()
        for node in nodes_of(tree):
            on_step(held, node)
            after = admit(tree, held, node).held
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return seen


@pytest.mark.parametrize("leaves", range(1, 9))
def test_every_order_of_arrival_gives_the_one_sum(leaves: int) -> None:
    """Exhaustive: every transition from every reachable set keeps "each held node has its canonical value" true."""
    tree = Tree(leaves)

    def check(held: Held, node: TreeNode) -> None:
        values = {h: canonical(h) for h in held}
        admission = admit(tree, held, node)
        if admission.duplicate:
            assert any(h.covers(node) for h in held)
            assert (admission.held, admission.covered, admission.merges) == (held, (), ())
            return
        values[node] = canonical(node)
        for covered in admission.covered:
            assert node.covers(covered) and covered != node
            del values[covered]
        for merge in admission.merges:
            values[merge.parent] = f"({values.pop(merge.left)}+{values.pop(merge.right)})"
        assert values == {h: canonical(h) for h in admission.held}

    states = reachable(tree, check)

    assert frozenset({tree.root}) in states
    for held in states:
        leaves_held = [leaf for h in held for leaf in range(h.first, h.first + h.leaves)]
        assert len(leaves_held) == len(set(leaves_held)), "each leaf at most once"
        assert len(held) <= -(-leaves // 2)
        assert (tree.root in held) == (len(leaves_held) == leaves)
        after = held
        for leaf in range(leaves):  # whatever is held, the leaves complete it
            after = admit(tree, after, TreeNode(leaf, 1)).held
        assert after == frozenset({tree.root})


def test_the_bound_on_live_nodes_is_reached() -> None:
    assert max(len(held) for held in reachable(Tree(7), lambda *_: None)) == 4


@pytest.mark.parametrize("node", [TreeNode(1, 2), TreeNode(0, 5), TreeNode(-1, 1), TreeNode(0, 0), TreeNode(7, 2)])
def test_what_is_no_node_of_the_tree_is_refused(node: TreeNode) -> None:
    with pytest.raises(KeyError):
        admit(Tree(8), NOTHING, node)


# ---- with the memory behind the nodes ----


class Books:
    """Keeps what becomes of the memory behind each node that a `Sums` of strings is given."""

    def __init__(self, tree: Tree) -> None:
        self.given: list[list[str]] = []
        self.released: list[list[str]] = []
        self.sums: Sums[list[str]] = Sums(tree, self.add)

    def offer(self, node: TreeNode) -> bool:
        words = [canonical(node)]
        self.given.append(words)
        return self.sums.offer(node, Entry(words, lambda: self.release(words)))

    def add(self, left: list[str], right: list[str], parent: TreeNode) -> list[str]:
        assert not any(part is gone for part in (left, right) for gone in self.released), "added after its release"
        left[0] = f"({left[0]}+{right[0]})"
        assert left[0] == canonical(parent)
        return left

    def release(self, words: list[str]) -> None:
        assert not any(words is other for other in self.released), "released twice"
        self.released.append(words)


@settings(max_examples=150)
@given(leaves=st.integers(1, 64), buckets=st.integers(1, 3), data=st.data())
def test_losses_duplicates_and_overlaps_in_several_buckets(leaves: int, buckets: int, data: st.DataObject) -> None:
    """Frames of random nodes arrive in any order, then whatever is missing: every root is the canonical sum."""
    tree = tree_of(leaves)
    nodes = nodes_of(tree)
    books = [Books(tree) for _ in range(buckets)]

    def offer(bucket: int, node: TreeNode) -> None:
        held = books[bucket].sums.holds(node)
        assert books[bucket].offer(node) is not held
        assert not held or books[bucket].released[-1] is books[bucket].given[-1], "a duplicate is released at once"

    for frame in data.draw(st.lists(st.tuples(st.integers(0, buckets - 1), st.sampled_from(nodes)), max_size=60)):
        offer(*frame)
    for bucket, book in enumerate(books):
        for leaf in data.draw(st.permutations(range(leaves))):
            if not book.sums.is_complete:
                offer(bucket, TreeNode(leaf, 1))
        assert book.sums.is_complete
        assert book.sums.root == [canonical(tree.root)]
        root = book.sums.take_root()
        assert root.value == [canonical(tree.root)]
        assert len(book.released) == len(book.given) - 1
        assert not any(root.value is gone for gone in book.released), "the root is the caller's"
        root.release()
        assert book.released[-1] is root.value, "and gives back its own memory"
        assert not book.sums.is_complete
        assert not book.sums.holds(TreeNode(0, 1)), "the next step begins empty"


def test_memory_is_released_when_the_bucket_is_what_it_is() -> None:
    """A release tells its trainer which bucket is open: it must not be the one that was just completed."""
    seen: list[bool] = []
    sums: Sums[list[str]] = Sums(Tree(2), lambda left, *_: left)
    sums.offer(TreeNode(0, 1), Entry(["0"], lambda: seen.append(sums.is_complete)))
    sums.offer(TreeNode(1, 1), Entry(["1"], lambda: seen.append(sums.is_complete)))
    assert seen == [True]
    sums.take_root().release()

    assert seen == [True, False]


def test_a_sum_that_is_refused_leaves_everything_as_it_was() -> None:
    released: list[str] = []
    sums: Sums[Statistics] = Sums(Tree(2), lambda left, right, _: add_statistics(left, right))
    sums.offer(TreeNode(0, 1), Entry(np.ones(2), lambda: released.append("left")))
    for _ in range(2):
        with pytest.raises(FrameError, match="do not add"):
            sums.offer(TreeNode(1, 1), Entry(np.ones(3)))
    assert released == []
    sums.offer(TreeNode(1, 1), Entry(np.ones(2), lambda: released.append("right")))

    assert sums.root.tolist() == [2.0, 2.0]
    assert released == ["right"]


@settings(max_examples=60)
@given(
    leaves=st.integers(1, 12),
    steps=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_every_buffer_of_the_pool_comes_back_once(
    leaves: int, steps: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    tree, pool = tree_of(leaves), Pool(dtype)
    sums: Sums[torch.Tensor] = Sums(tree, lambda left, right, _: left.add_(right))
    for _ in range(steps):
        arrivals = data.draw(st.lists(st.sampled_from(nodes_of(tree)), max_size=20))
        for node in [*arrivals, *(TreeNode(leaf, 1) for leaf in range(leaves))]:
            words = pool.take(4).fill_(node.leaves)
            sums.offer(node, Entry(words, partial(pool.give, words)))
        root = sums.take_root()
        assert root.value.tolist() == [leaves] * 4
        root.release()
    free = pool._free[4]
    assert {tensor.dtype for tensor in free} == {dtype}
    assert len({tensor.data_ptr() for tensor in free}) == len(free), "one buffer twice in the pool"
    assert pool.allocated_bytes == 4 * dtype.itemsize * len(free), "a buffer was lost"
    assert len(free) <= -(-leaves // 2) + leaves.bit_length() + 1


def test_the_pool_keeps_lengths_apart() -> None:
    pool = Pool(torch.float32)
    small = pool.take(3)
    pool.give(small)

    assert pool.take(4).numel() == 4
    assert pool.take(3) is small
    assert pool.allocated_bytes == 28


# ---- squares of blocks ----


def test_squares_are_by_global_block_and_the_same_wherever_a_span_starts() -> None:
    root = torch.randn(3 * BLOCK_WORDS + 48, generator=torch.Generator().manual_seed(1))
    whole = block_squares(root, 5)
    split = block_squares(root[:BLOCK_WORDS].clone(), 5) | block_squares(root[BLOCK_WORDS:].clone(), 6)

    assert list(whole) == [5, 6, 7, 8]
    assert whole == split
    exact = [float((part.double() ** 2).sum()) for part in root.split(BLOCK_WORDS)]
    assert list(whole.values()) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_shows_in_the_squares(bad: float) -> None:
    root = torch.zeros(2 * BLOCK_WORDS)
    root[BLOCK_WORDS + 7] = bad

    first, second = block_squares(root, 0).values()

    assert first == 0.0
    assert not np.isfinite(second)


def test_squares_of_huge_sums_stay_finite() -> None:
    assert np.isfinite(block_squares(torch.full((BLOCK_WORDS,), 3e38), 0)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_words", [16, BLOCK_WORDS, 2 * BLOCK_WORDS + 48])
def test_the_last_addition_and_the_squares_in_one_pass_are_the_two_passes(dtype: torch.dtype, num_words: int) -> None:
    generator = torch.Generator().manual_seed(num_words)
    left, right = (torch.randn(num_words, generator=generator).to(dtype) for _ in range(2))
    whole, added = left + right, left.clone()

    squares = block_squares(added, 3, right)

    assert torch.equal(added, whole)
    assert squares == block_squares(whole, 3)
