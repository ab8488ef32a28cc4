"""The open step of a partition: nodes in, vote out; decision in, update done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.played import played_spec
from pscluster.step.codec import BufferNode
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode, touched_bits, tree_of
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.state import PartitionState
from psserver.partition.step.voting import CommitDecision

W, MEAN, VAR, COUNT, FIXED = range(5)
LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(4,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(3,), dtype="float32", kind="averaged"),
        TensorSpec(names=("var",), shape=(3,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
        TensorSpec(names=("fixed",), shape=(2,), dtype="float32", kind="frozen"),
    )
)
TRAINED, AVERAGED, CARRIED, FROZEN = range(4)


class Played:
    """A partition's open step over D shards; SGD with rate 1 and no momentum, so that updates are plain to see."""

    def __init__(self, shards: int = 2, **network: str) -> None:
        self.spec = played_spec(shards, train={"optimizer": {"name": "sgd", "lr": 1.0}}, network=network)
        self.state = PartitionState.empty(LAYOUT, 0, 1, 0, self.spec.network.pull_codec)
        self.given: list[torch.Tensor] = []
        self.released: list[torch.Tensor] = []
        self.step = OpenStep(self.state, self.spec, 100)
        self.state.values[AVERAGED].copy_(averaged([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]))
        self.state.values[CARRIED][0] = 5

    def offer(self, node: TreeNode, gradient: float) -> bool:
        words = self.step.pool.take(16).fill_(0.0)
        words[:4] = gradient
        self.given.append(words)
        return self.step.offer_trained(TRAINED, node, words, lambda: self.release(words))

    def release(self, words: torch.Tensor) -> None:
        self.released.append(words)
        self.step.pool.give(words)

    def push(self, shard: int, gradient: float = 1.0, *, touched: Iterable[int] = (W, MEAN), **fields: Any) -> None:
        """Everything of one shard; its live buffers are given as `mean` and `var`, `weight` is 1 unless given."""
        node, weight = TreeNode(shard, 1), fields.get("weight", 1.0)
        self.offer(node, gradient)
        moved = None
        if "mean" in fields:
            moved = averaged(fields["mean"], fields.get("var", [10.0, 20.0, 30.0])) * weight
        self.step.offer_buffers(AVERAGED, node, BufferNode(0.0 if moved is not None else weight, moved))
        if shard == 0:
            counted = torch.zeros(16, dtype=torch.int32)
            counted[0] = fields.get("count", 5)
            self.step.offer_buffers(CARRIED, node, BufferNode(weight, counted if "count" in fields else None))
        bits = touched_bits(touched, len(LAYOUT.tensors))
        loss = fields.get("loss", 1.0)
        self.step.offer_summary(node, Summary(loss_sum=loss, weight=weight, samples=1, touched=bits))

    def carry_out(self, kind: Any = "commit", scale: float = 1.0) -> list[int]:
        self.step.decide(CommitDecision(generation=1, step=0, kind=kind, scale=scale))
        updated = []
        while (bucket := self.step.next_update()) is not None:
            self.step.update()
            updated.append(bucket)
        return updated


def averaged(mean: list[float], var: list[float]) -> torch.Tensor:
    words = torch.zeros(32)
    words[:3], words[16:19] = torch.tensor(mean), torch.tensor(var)
    return words


def test_a_step_is_complete_when_every_kind_is() -> None:
    played = Played()
    assert not played.step.is_complete
    played.push(0)
    assert not played.step.is_complete
    assert played.step.open_bucket == TRAINED
    played.push(1)

    assert played.step.is_complete
    assert played.step.open_bucket == -1


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_a_commit_scales_sums_and_moves_parameters_and_buffers(codec: str) -> None:
    played = Played(push_codec=codec)
    played.push(0, 1.0, mean=[2.0, 2.0, 3.0], weight=1.0, count=6)
    played.push(1, 3.0, mean=[6.0, 2.0, 3.0], weight=3.0)

    assert played.carry_out(scale=0.5) == [TRAINED, AVERAGED, CARRIED]

    assert played.state.values[TRAINED].tolist() == [-2.0] * 4 + [0.0] * 12
    assert played.state.values[AVERAGED][:3].tolist() == [5.0, 2.0, 3.0], "(1 * 2 + 3 * 6) / 4"
    assert played.state.values[CARRIED][0] == 6
    assert played.state.update_counts == [1, 0, 0, 0, 0], "buffers have no age"
    assert not played.step.is_complete
    assert played.step.open_bucket == TRAINED
    assert len(played.released) == len(played.given) == 2


def test_buffers_that_no_microbatch_moved_keep_their_bits() -> None:
    played = Played()
    before = played.state.values[AVERAGED].clone()
    for shard in range(2):
        played.push(shard, touched=[W])
    played.carry_out()

    assert torch.equal(played.state.values[AVERAGED], before)
    assert played.state.values[CARRIED][0] == 5


def test_of_a_bucket_only_the_moved_buffers_change() -> None:
    """`var` lies in the same bucket and is averaged with it, but nobody moved it: 0.1 * 3 / 3 is not 0.1."""
    played = Played(3)
    played.state.values[AVERAGED][16:19] = 0.1
    for shard in range(3):
        played.push(shard, mean=[2.0, 2.0, 2.0], var=[0.1, 0.1, 0.1])
    played.carry_out()

    assert played.state.values[AVERAGED][16:19].tolist() == torch.full((3,), 0.1).tolist()
    assert played.state.values[AVERAGED][:3].tolist() == [2.0] * 3


def test_a_microbatch_that_moved_nothing_counts_with_the_committed_value() -> None:
    played = Played()
    played.push(0, mean=[5.0, 2.0, 3.0], weight=1.0)
    played.push(1, weight=3.0, touched=[W])
    played.carry_out()

    assert played.state.values[AVERAGED][0] == (1 * 5.0 + 3 * 1.0) / 4


def test_a_step_without_weight_leaves_the_buffers_alone() -> None:
    played = Played(1)
    played.push(0, 0.0, mean=[7.0, 7.0, 7.0], weight=0.0)
    played.carry_out(scale=0.0)

    assert played.state.values[AVERAGED][:3].tolist() == [1.0, 2.0, 3.0]


def test_an_untouched_parameter_is_not_updated_and_does_not_age() -> None:
    played = Played()
    for shard in range(2):
        played.push(shard, touched=[])
    played.carry_out()

    assert played.state.values[TRAINED].tolist() == [0.0] * 16
    assert played.state.update_counts == [0] * 5


def test_a_skipped_step_changes_nothing_and_gives_everything_back() -> None:
    played = Played()
    before = [v.clone() for v in played.state.values]
    for shard in range(2):
        played.push(shard, math.nan, mean=[9.0, 9.0, 9.0], count=9)

    assert played.carry_out("skip") == []

    assert all(torch.equal(a, b) for a, b in zip(before, played.state.values, strict=True))
    assert played.state.update_counts == [0] * 5
    assert {id(words) for words in played.released} == {id(words) for words in played.given}
    assert len(played.released) == 2
    assert len(played.step.pool._free[16]) * 64 == played.step.pool.allocated_bytes
    for shard in range(2):
        played.push(shard)
    assert played.carry_out() == [TRAINED, AVERAGED, CARRIED], "the next step begins afresh"
    assert played.state.values[TRAINED][0] == -2.0


@pytest.mark.parametrize(
    ("fields", "finite"),
    [
        ({}, True),
        ({"gradient": math.inf}, False),
        ({"gradient": math.nan}, False),
        ({"mean": [math.nan, 0.0, 0.0]}, False),
        ({"mean": [1e30, 0.0, 0.0]}, True),
    ],
)
def test_the_vote_says_what_is_finite(fields: dict[str, Any], finite: bool) -> None:
    played = Played()
    played.push(0, **fields)
    played.push(1)

    squares, said = played.step.make_vote()

    assert said is finite
    assert list(squares) == [0]
    if "gradient" not in fields:
        assert squares == {0: 16.0}


def test_duplicates_are_told_and_give_their_memory_back() -> None:
    played = Played()
    played.push(0)

    assert not played.offer(TreeNode(0, 1), 100.0)
    assert not played.step.offer_buffers(AVERAGED, TreeNode(0, 1), BufferNode(1.0, None))
    assert not played.step.offer_summary(TreeNode(0, 1), Summary(loss_sum=9, weight=9, samples=9, touched=b"\0"))
    assert [id(words) for words in played.released] == [id(played.given[1])]
    played.push(1)
    played.carry_out()
    assert played.state.values[TRAINED][0] == -2.0


def test_memory_is_given_back_once_it_is_not_read_any_more() -> None:
    """The right side of a sum at once, a covered node at once, the root after its bucket was updated."""
    played = Played(3)
    played.offer(TreeNode(0, 1), 1.0)
    played.offer(TreeNode(2, 1), 4.0)
    played.offer(TreeNode(1, 1), 2.0)
    leaf, last, right = played.given
    assert [id(words) for words in played.released] == [id(right), id(last)], "0 + 1, and that + 2"
    assert played.step.trained[TRAINED].root is leaf

    played = Played(3)
    played.offer(TreeNode(1, 1), 100.0)
    played.offer(TreeNode(0, 2), 3.0)
    played.offer(TreeNode(2, 1), 4.0)
    assert [id(words) for words in played.released] == [id(played.given[0]), id(played.given[2])]
    for shard in range(3):
        played.push(shard)
    released = len(played.released)
    played.step.decide(CommitDecision(generation=1, step=0, kind="commit"))
    assert len(played.released) == released, "the update still reads it"
    played.step.update()
    assert played.released[-1] is played.given[1]
    assert played.state.values[TRAINED][0] == -7.0


def test_the_squares_are_those_of_the_sum_whether_it_came_whole_or_in_parts() -> None:
    parts, whole, covering = Played(), Played(), Played()
    for shard, gradient in enumerate((1.0, 2.5)):
        parts.push(shard, gradient)
    covering.offer(TreeNode(1, 1), 100.0)
    for played in (whole, covering):
        played.offer(TreeNode(0, 2), 3.5)
        for shard in range(2):
            played.push(shard, 100.0)

    assert [played.step.make_vote()[0] for played in (parts, whole, covering)] == [{0: 4 * 3.5**2}] * 3


def test_squares_of_a_step_are_not_those_of_the_next() -> None:
    played = Played(1)
    for gradient in (3.0, 5.0):
        played.push(0, gradient)
        assert played.step.make_vote()[0] == {0: 4 * gradient**2}
        played.carry_out()


@pytest.mark.parametrize("pull_codec", ["fp32", "bf16"])
def test_what_trainers_read_follows_each_update_rounded_by_the_pull_codec(pull_codec: str) -> None:
    played = Played(1, pull_codec=pull_codec)
    third = 1 / 3
    played.push(0, -third, mean=[third, 2.0, 3.0], count=7)
    played.step.decide(CommitDecision(generation=1, step=0, kind="commit"))
    before = [published.clone() for published in played.state.published]
    played.step.update()

    exact = torch.tensor(third)
    assert torch.equal(played.state.values[TRAINED][:4], exact.expand(4)), "what is trained is exact in any case"
    wanted = exact.bfloat16() if pull_codec == "bf16" else exact
    assert torch.equal(played.state.published[TRAINED][:4], wanted.expand(4))
    assert torch.equal(played.state.published[AVERAGED], before[AVERAGED]), "bucket by bucket"
    played.step.update()
    played.step.update()
    assert torch.equal(played.state.published[AVERAGED][0], exact), "buffers are never rounded"
    assert played.state.published[CARRIED][0] == 7


# ---- the worker's sums and the partition's are the same sums ----


@settings(max_examples=80)
@given(shards=st.integers(1, 9), data=st.data())
def test_buffers_come_out_the_same_whoever_adds_them(shards: int, data: st.DataObject) -> None:
    """Any cut of the tree into pushed nodes, in any order, gives the bits that one worker for all shards gives."""
    tree = tree_of(shards)
    committed = torch.tensor([0.1, -0.0, 3e-5])
    moved = data.draw(st.lists(st.booleans(), min_size=shards, max_size=shards))
    weights = data.draw(st.lists(st.floats(0, 50, width=32), min_size=shards, max_size=shards))
    generator = torch.Generator().manual_seed(7)
    live = [torch.randn(3, generator=generator) for _ in range(shards)]

    def leaf(shard: int) -> BufferNode:
        return BufferNode(weights[shard], live[shard] * weights[shard] if moved[shard] else None)

    def summed(node: TreeNode) -> BufferNode:
        """What a worker that owns these leaves pushes."""
        if node.leaves == 1:
            return leaf(node.first)
        left = 1 << ((node.leaves - 1).bit_length() - 1)
        right = TreeNode(node.first + left, node.leaves - left)
        return summed(TreeNode(node.first, left)).plus(summed(right), committed)

    whole = summed(tree.root)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=shards, max_size=shards))
    pushed = [node for who in range(3) for node in tree.cover(s for s in range(shards) if owners[s] == who)]
    held: dict[TreeNode, BufferNode] = {}
    for node in data.draw(st.permutations(pushed)):
        value = summed(node)
        wired = BufferNode(value.weight if value.words is None else 0.0, value.words)  # what a frame carries
        merge = tree.merge_of(node)
        while merge is not None and (merge.left if node == merge.right else merge.right) in held:
            other = held.pop(merge.left if node == merge.right else merge.right)
            left, right = (other, wired) if node == merge.right else (wired, other)
            node, wired = merge.parent, left.plus(right, committed)
            merge = tree.merge_of(node)
        held[node] = wired

    assert set(held) == {tree.root}
    root = held[tree.root]
    if whole.words is None:
        assert root.words is None
        assert root.weight == whole.weight
    else:
        assert root.words is not None
        assert torch.equal(root.words.view(torch.int32), whole.words.view(torch.int32))
