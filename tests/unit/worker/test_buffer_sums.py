"""Buffers: weighted sums in the tree, the same bits however shards are split; integer ones from shard 0."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pscluster.job.optimizer import OptimizerSection
from pscluster.step.codec import BufferNode
from pscluster.step.tree import TreeNode, tree_of
from psworker.replica import Replica
from psworker.trainer.gradients.accumulate import BufferSums

BatchFor = dict[int, tuple[float, bool]]  # shard -> (weight, whether it moves the buffers)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build() -> Replica:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    replica = Replica(model, OptimizerSection())
    for number, tensor in enumerate(replica.layout.tensors):  # committed values that are not round
        if tensor.kind == "averaged":
            bucket, offset = replica.layout.bucket_of[number]
            replica.flats[bucket][offset : offset + tensor.num_elements] += 0.1
    return replica


def averaged_bucket(replica: Replica) -> int:
    return next(b.index for b in replica.layout.buckets if b.kind == "averaged")


def carried_bucket(replica: Replica) -> int:
    return next(b.index for b in replica.layout.buckets if b.kind == "carried")


def microbatch(replica: Replica, shard: int, moves: bool) -> list[int]:
    """Run the model as a trainer does; returns the averaged buffers that it moved."""
    replica.buffers.restore()
    replica.model.train(moves)
    replica.model(torch.randn(5, 3, generator=torch.Generator().manual_seed(shard)))
    return replica.buffers.check()


def pushed_by(shards: list[int], batches: BatchFor, num_shards: int) -> dict[TreeNode, BufferNode]:
    """The averaged bucket's nodes of one worker that owns these shards."""
    replica, tree = build(), tree_of(num_shards)
    sums = BufferSums(replica, tree)
    sums.begin_run(tree.cover(shards))
    found: dict[TreeNode, BufferNode] = {}
    for shard in shards:
        weight, moves = batches[shard]
        for bucket, node, total, words in sums.carry(shard, weight, microbatch(replica, shard, moves)):
            if bucket == averaged_bucket(replica):
                found[node] = BufferNode(0.0 if words is not None else total, words)
    assert sums.flush() == []
    return found


def completed(found: dict[TreeNode, BufferNode], num_shards: int) -> BufferNode:
    """The partition's side: nodes add up to the root, left + right, over the committed values."""
    replica, tree = build(), tree_of(num_shards)
    committed = replica.flats[averaged_bucket(replica)]
    held = dict(found)
    for node in sorted(found):
        merge = tree.merge_of(node)
        while merge is not None and {merge.left, merge.right} <= held.keys():
            held[merge.parent] = held.pop(merge.left).plus(held.pop(merge.right), committed)
            merge = tree.merge_of(merge.parent)
    assert set(held) == {tree.root}
    return held[tree.root]


@settings(max_examples=25)
@given(num_shards=st.integers(1, 6), data=st.data())
def test_any_split_over_workers_gives_the_bits_of_one(num_shards: int, data: st.DataObject) -> None:
    batch = st.tuples(st.sampled_from([0.0, 1.0, 3.0, 0.7]), st.booleans())
    drawn = data.draw(st.lists(batch, min_size=num_shards, max_size=num_shards))
    batches = dict(enumerate(drawn))
    owners = data.draw(st.lists(st.integers(0, 2), min_size=num_shards, max_size=num_shards))
    split: dict[TreeNode, BufferNode] = {}
    for worker in range(3):
        split |= pushed_by([s for s in range(num_shards) if owners[s] == worker], batches, num_shards)

    together = completed(split, num_shards)
    alone = completed(pushed_by(list(range(num_shards)), batches, num_shards), num_shards)

    assert (together.words is None) == (alone.words is None) == (not any(moves for _, moves in drawn))
    if together.words is None or alone.words is None:
        assert together.weight == alone.weight
    else:
        assert torch.equal(together.words.view(torch.int32), alone.words.view(torch.int32))


def test_the_sum_is_of_weights_times_live_values() -> None:
    batches = {0: (1.0, True), 1: (3.0, True)}
    root = completed(pushed_by([0, 1], batches, 2), 2)
    live = []
    for shard in (0, 1):
        replica = build()
        microbatch(replica, shard, True)
        norm = replica.model[1]
        assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None
        live.append(norm.running_mean.clone())

    assert root.words is not None
    assert torch.equal(root.words[:4], live[0] * 1.0 + live[1] * 3.0)


def test_integer_buffers_come_from_shard_0_alone_and_only_when_they_moved() -> None:
    replica = build()
    sums = BufferSums(replica, tree_of(2))
    sums.begin_run([TreeNode(0, 1), TreeNode(1, 1)])
    carried = carried_bucket(replica)

    moved = [ready for ready in sums.carry(0, 1.0, microbatch(replica, 0, True)) if ready[0] == carried]
    other = [ready for ready in sums.carry(1, 1.0, microbatch(replica, 1, True)) if ready[0] == carried]
    ((_, node, weight, words),) = moved
    assert (node, weight, other) == (TreeNode(0, 1), 1.0, [])
    assert words is not None and words.dtype == torch.int32
    assert words[0] == 1 and words[16] == 1, "num_batches_tracked of both layers"

    sums.begin_run([TreeNode(0, 1)])
    still = [ready for ready in sums.carry(0, 2.0, microbatch(replica, 0, False)) if ready[0] == carried]
    assert still == [(carried, TreeNode(0, 1), 2.0, None)]


def test_what_is_held_is_given_up_or_forgotten() -> None:
    replica = build()
    sums = BufferSums(replica, tree_of(4))
    bucket = averaged_bucket(replica)
    sums.begin_run([TreeNode(0, 4)])
    assert [r[0] for r in sums.carry(1, 2.0, [])] == []
    assert sums.flush() == [(bucket, TreeNode(1, 1), 2.0, None)]

    sums.begin_run([TreeNode(0, 4)])
    sums.carry(1, 2.0, [])
    sums.flush()
    assert sums.flush() == []


def test_a_model_without_buffers_pushes_none() -> None:
    replica = Replica(nn.Linear(2, 2), OptimizerSection())
    sums = BufferSums(replica, tree_of(1))
    sums.begin_run([TreeNode(0, 1)])

    assert sums.carry(0, 1.0, []) == []


@pytest.mark.parametrize("moved", [[], [0]])
def test_adding_nodes_never_changes_the_committed_values(moved: list[int]) -> None:
    committed = torch.tensor([0.5, -0.0])
    left = BufferNode(2.0, torch.ones(2) if moved else None)
    before = committed.clone()

    whole = left.plus(BufferNode(3.0, None), committed)

    assert torch.equal(committed.view(torch.int32), before.view(torch.int32))
    assert (whole.words is None) == (not moved)
    if whole.words is not None:
        assert whole.words.tolist() == [1.0 + 1.5, 1.0]
    else:
        assert whole.weight == 5.0
