"""From autograd's gradients to nodes of the tree: the bits that adding microbatch gradients by hand gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import pscluster.step.layout
from pscluster.errors import TaskError
from pscluster.job.optimizer import OptimizerSection
from pscluster.step.layout import Layout
from pscluster.step.tree import Summary, Tree, TreeNode, tree_of
from psworker.replica import layout_of
from psworker.trainer.gradients.accumulate import Accumulator, Counter, Gradients
from psworker.trainer.gradients.push import gather
from psworker.trainer.work import Work

WORK = Work(restore_generation=1, generation=1, version=0, action="train")

ProcessLoss = Callable[[nn.Module, int], torch.Tensor]
Flat = dict[int, torch.Tensor]  # bucket -> words


def words_of(
    layout: Layout, bucket: int, gradients: Sequence[torch.Tensor | None], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A bucket's words as they go over the wire: zeros where nothing was touched."""
    words = torch.zeros(layout.buckets[bucket].num_words, dtype=dtype)
    for start, stop, data in gather(layout, bucket, gradients):
        assert data.dtype == dtype
        words[start:stop] = data
    return words


class Played:
    """A model under an accumulator; keeps every node pushed, copied at once."""

    def __init__(self, model: nn.Module, shards: int, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.dtype = dtype
        self.layout = layout_of(model, OptimizerSection())
        self.tree = tree_of(shards)
        self.pushed: dict[tuple[int, TreeNode], torch.Tensor] = {}
        numbers = {id(p): p for p in model.parameters()}
        order = [p for p in numbers.values() if p.requires_grad]
        trained = [n for n, t in enumerate(self.layout.tensors) if t.kind == "trained"]
        self.parameters = dict(zip(order, trained, strict=True))
        self.accumulator = Accumulator(self.layout, self.parameters, self.tree, self.push, dtype)
        self.during_backward: list[bool] = []
        self.in_backward = False

    def push(self, work: Work, bucket: int, node: TreeNode, gradients: Gradients) -> None:
        assert work is WORK
        assert (bucket, node) not in self.pushed, "a node is pushed once"
        self.pushed[bucket, node] = words_of(self.layout, bucket, gradients, self.dtype).clone()
        self.during_backward.append(self.in_backward)

    def microbatch(self, loss: ProcessLoss, shard: int) -> set[int]:
        torch.manual_seed(shard)
        self.accumulator.begin(shard)
        value = loss(self.model, shard)
        self.in_backward = True
        value.backward()  # type: ignore[no-untyped-call]
        self.in_backward = False
        assert all(p.grad is None for p in self.parameters if p.numel())
        return self.accumulator.finish()

    def run(self, loss: ProcessLoss, shards: Sequence[int], roots: Sequence[TreeNode] | None = None) -> list[set[int]]:
        self.accumulator.begin_run(WORK, self.tree.cover(shards) if roots is None else roots)
        touched = [self.microbatch(loss, shard) for shard in shards]
        self.accumulator.flush()
        return touched

    def root(self) -> Flat:
        """The tree completed from what was pushed, as a partition does it: words add to words, left + right."""
        held = dict(self.pushed)
        for bucket, node in sorted(held):
            merge = self.tree.merge_of(node)
            while merge is not None and {(bucket, merge.left), (bucket, merge.right)} <= held.keys():
                left, right = held.pop((bucket, merge.left)), held.pop((bucket, merge.right))
                held[bucket, merge.parent] = left.add_(right)
                merge = self.tree.merge_of(merge.parent)
        assert {node for _, node in held} == {self.tree.root}
        return {bucket: words for (bucket, _), words in held.items()}


def by_hand(model: nn.Module, loss: ProcessLoss, shards: int, dtype: torch.dtype = torch.float32) -> Flat:
    """Each microbatch's gradient by plain PyTorch, rounded, added in the tree's order; zeros where there is none."""
    layout = layout_of(model, OptimizerSection())
    leaves: list[Flat] = []
    for shard in range(shards):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(shard)
        loss(model, shard).backward()  # type: ignore[no-untyped-call]
        named = dict(model.named_parameters())
        grads = [named[t.name].grad if t.kind == "trained" else None for t in layout.tensors]
        dense = [None if g is None else (g.to_dense() if g.is_sparse else g).to(dtype) for g in grads]
        leaves.append(
            {
                b.index: words_of(layout, b.index, [dense[p.tensor] for p in b.placed], dtype).clone()
                for b in layout.buckets
                if b.kind == "trained"
            }
        )
    model.zero_grad(set_to_none=True)

    def summed(node: TreeNode) -> Flat:
        if node.leaves == 1:
            return {bucket: words.clone() for bucket, words in leaves[node.first].items()}
        count = 1 << ((node.leaves - 1).bit_length() - 1)
        left, right = summed(TreeNode(node.first, count)), summed(TreeNode(node.first + count, node.leaves - count))
        return {bucket: words + right[bucket] for bucket, words in left.items()}

    return summed(TreeNode(0, shards))


@lru_cache
def net_by_hand(shards: int, dtype: torch.dtype = torch.float32) -> Flat:
    return by_hand(Net(), net_loss, shards, dtype)


def assert_same_bits(mine: Flat, other: Flat) -> None:
    assert mine.keys() == other.keys()
    for bucket, words in mine.items():
        assert words.dtype == other[bucket].dtype
        assert torch.equal(words.view(torch.uint8), other[bucket].view(torch.uint8)), f"bucket {bucket}"


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(pscluster.step.layout, "BUCKET_WORDS", 256)


class Net(nn.Module):
    """A few layers, dropout, a branch for even shards only, a parameter nobody uses, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 8)
        self.first = nn.Linear(8, 24)
        self.branch = nn.Linear(24, 24)
        self.unused = nn.Parameter(torch.ones(5))
        self.norm = nn.LayerNorm(24)
        self.back = nn.Linear(24, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, tokens: torch.Tensor, branch: bool) -> torch.Tensor:
        hidden = self.first(self.embedding(tokens) * self.frozen).relu()
        if branch:
            hidden = hidden + self.branch(hidden)
        out = self.head(self.back(nn.functional.dropout(self.norm(hidden), 0.2)))
        assert isinstance(out, torch.Tensor)
        return out


def net_loss(model: nn.Module, shard: int) -> torch.Tensor:
    tokens = torch.randint(0, 13, (3, 5), generator=torch.Generator().manual_seed(100 + shard))
    logits = model(tokens, shard % 2 == 0)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
def test_one_worker_gives_the_sum_by_hand(shards: int, dtype: torch.dtype) -> None:
    played = Played(Net(), shards, dtype)

    touched = played.run(net_loss, range(shards))

    assert_same_bits(played.root(), net_by_hand(shards, dtype))
    assert set(played.pushed) == {(b, TreeNode(0, shards)) for b in {b for b, _ in played.pushed}}, (
        "only roots are pushed"
    )
    names = {t.name: n for n, t in enumerate(played.layout.tensors)}
    for shard, hit in enumerate(touched):
        assert names["unused"] not in hit and names["frozen"] not in hit
        assert (names["branch.weight"] in hit) == (shard % 2 == 0)
        assert names["embedding.weight"] in hit


@DTYPES
@settings(max_examples=12)
@given(shards=st.integers(1, 6), data=st.data())
def test_any_split_over_workers_gives_the_same_bits(dtype: torch.dtype, shards: int, data: st.DataObject) -> None:
    """Whoever owns which shards, in whatever order they compute them: pushed nodes add up to the same root."""
    owners = data.draw(st.lists(st.integers(0, 2), min_size=shards, max_size=shards))
    together: dict[tuple[int, TreeNode], torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pscluster.step.layout, "BUCKET_WORDS", 256)
        for worker in range(3):
            mine = [shard for shard in range(shards) if owners[shard] == worker]
            order = data.draw(st.permutations(mine))
            played = Played(Net(), shards, dtype)
            played.run(net_loss, order)
            together |= played.pushed
        played.pushed = together

        assert_same_bits(played.root(), net_by_hand(shards, dtype))


def test_a_run_that_ends_early_gives_up_what_it_has() -> None:
    """Shards 2 and 3 went to somebody else after the run had begun."""
    first, second = Played(Net(), 4), Played(Net(), 4)
    first.run(net_loss, [0, 1, 2], roots=[TreeNode(0, 4)])
    second.run(net_loss, [3])

    assert {node for _, node in first.pushed} == {TreeNode(0, 2), TreeNode(2, 1)}
    first.pushed |= second.pushed
    assert_same_bits(first.root(), net_by_hand(4))


def test_buckets_are_pushed_while_backward_runs_once_it_is_known() -> None:
    played = Played(nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]), 1)

    def loss(model: nn.Module, _: int) -> torch.Tensor:
        value = model(torch.ones(2, 16)).sum()
        assert isinstance(value, torch.Tensor)
        return value

    played.run(loss, [0])
    assert not any(played.during_backward), "the first backward is only watched"
    buckets = [bucket for bucket, _ in played.pushed]
    assert len(buckets) > 2 and buckets == sorted(buckets, reverse=True)

    played.pushed.clear()
    played.during_backward.clear()
    played.run(loss, [0])
    assert all(played.during_backward)
    assert [bucket for bucket, _ in played.pushed] == buckets, "in the order in which backward gives them"


def test_abandoning_forgets_everything() -> None:
    played = Played(Net(), 4)
    played.accumulator.begin_run(WORK, [TreeNode(0, 4)])
    played.microbatch(net_loss, 0)
    played.accumulator.begin(1)
    played.accumulator.abandon()
    assert played.pushed == {}

    played.run(net_loss, range(4))
    assert_same_bits(played.root(), net_by_hand(4))


@DTYPES
def test_a_microbatch_without_a_backward_pushes_zeros(dtype: torch.dtype) -> None:
    """It had no samples; its leaf is in the sum all the same."""
    played = Played(Net(), 1, dtype)
    played.accumulator.begin_run(WORK, [TreeNode(0, 1)])
    played.accumulator.begin(0)

    assert played.accumulator.finish() == set()
    assert {bucket for bucket, _ in played.pushed} == {b.index for b in played.layout.buckets if b.kind == "trained"}
    assert not any(words.any() for words in played.pushed.values())


def test_outside_of_a_microbatch_gradients_are_dropped() -> None:
    played = Played(Net(), 1)
    net_loss(played.model, 0).backward()  # type: ignore[no-untyped-call]

    assert played.pushed == {}
    assert all(p.grad is None for p in played.parameters)


def test_an_unhooked_model_is_the_users_again() -> None:
    played = Played(Net(), 1)
    played.accumulator.close()
    net_loss(played.model, 0).backward()  # type: ignore[no-untyped-call]

    assert dict(played.model.named_parameters())["first.weight"].grad is not None


# ---- what autograd does at its edges ----


class Shared(nn.Module):
    """Autograd gives a and b two views of one gradient, and c a slice of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3, 2))
        self.c, self.d = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(12))


def shared_loss(model: nn.Module, shard: int) -> torch.Tensor:
    assert isinstance(model, Shared)
    factor = torch.randn(6, generator=torch.Generator().manual_seed(shard))
    one = (factor * (model.a.view(6) + model.b.view(6))).sum()
    other = (torch.cat([factor, factor]) * (torch.cat([model.c, model.c * 2]) + model.d)).sum()
    return one + other


def test_gradients_that_share_memory_are_told_apart() -> None:
    played = Played(Shared(), 4)

    played.run(shared_loss, range(4))

    leaves = [torch.randn(6, generator=torch.Generator().manual_seed(shard)) for shard in range(4)]
    expected = (leaves[0] + leaves[1]) + (leaves[2] + leaves[3])
    words = played.root()[0]
    assert torch.equal(words[:6], expected) and torch.equal(words[16:22], expected)
    assert torch.equal(words[48:54], expected) and torch.equal(words[54:60], expected)
    torch.testing.assert_close(words[32:38], 3 * expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_sparse_or_not(sparse: bool) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 4, sparse=sparse), nn.Linear(4, 3))

    def loss(model: nn.Module, shard: int) -> torch.Tensor:
        rows = torch.randint(0, 20, (6,), generator=torch.Generator().manual_seed(shard))
        value = (model(rows) ** 2).sum()
        assert isinstance(value, torch.Tensor)
        return value

    played = Played(build(), 3)
    played.run(loss, range(3))

    assert_same_bits(played.root(), by_hand(build(), loss, 3))


@DTYPES
def test_minus_zero_and_untouched_add_as_zeros_do(dtype: torch.dtype) -> None:
    """-0.0 + nothing is what -0.0 + 0.0 is on the wire: 0.0. Alone (one shard) it stays -0.0."""

    def build() -> nn.Module:
        module = nn.Module()
        module.p = nn.Parameter(torch.ones(3))
        module.q = nn.Parameter(torch.ones(3))
        return module

    def loss(model: nn.Module, shard: int) -> torch.Tensor:
        value = (torch.tensor([-0.0, 0.0, -1.0]) * model.q).sum()  # type: ignore[operator]
        return value + (torch.tensor([-0.0, 2.0, -0.0]) * model.p).sum() if shard == 1 else value  # type: ignore[operator]

    for shards in (1, 2, 3, 4):
        for owner_of_last in (0, 1):
            mine = Played(build(), shards, dtype)
            mine.run(loss, range(shards - owner_of_last))
            other = Played(build(), shards, dtype)
            other.run(loss, range(shards - owner_of_last, shards))
            mine.pushed |= other.pushed
            assert_same_bits(mine.root(), by_hand(build(), loss, shards, dtype))


class Checkpointed(nn.Module):
    """The same layer twice, each time recomputed in backward."""

    def __init__(self, reentrant: bool, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reentrant, self.depth = reentrant, depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.depth):
            x = checkpoint(self.layer, x, use_reentrant=self.reentrant)
        out = self.head(x)
        assert isinstance(out, torch.Tensor)
        return out


def checkpointed_loss(model: nn.Module, shard: int) -> torch.Tensor:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(shard)).requires_grad_()
    out = model(x)
    assert isinstance(out, torch.Tensor)
    return (out**2).sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_right_re_entrant_or_not(reentrant: bool) -> None:
    """A re-entrant layer used twice fires twice in each backward; its bucket waits for the end of backward."""
    played = Played(Checkpointed(reentrant), 4)
    played.run(checkpointed_loss, range(4))

    assert_same_bits(played.root(), by_hand(Checkpointed(reentrant), checkpointed_loss, 4))


def test_a_gradient_that_comes_again_after_its_bucket_was_sent_is_refused_by_name() -> None:
    """The first microbatches use the layer once; a later one twice: wrong sums are never sent silently."""
    model = Checkpointed(reentrant=True, depth=1)
    played = Played(model, 2)
    played.accumulator.begin_run(WORK, [TreeNode(0, 1), TreeNode(1, 1)])
    played.microbatch(checkpointed_loss, 0)
    model.depth = 2

    with pytest.raises(TaskError, match=r"layer.*arrived twice") as refused:
        played.microbatch(checkpointed_loss, 1)

    assert "use_reentrant=False" in refused.value.action


def test_a_parameter_without_elements_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pscluster.step.layout, "BUCKET_WORDS", 16)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    played = Played(model, 1)
    played.run(lambda m, _: m[0](torch.ones(1, 4)).sum() + m(torch.ones(1, 4)).sum(), [0])  # type: ignore[index]

    assert {bucket for bucket, _ in played.pushed} == {b.index for b in played.layout.buckets}


def test_a_gradient_of_another_memory_format_is_written_in_its_parameters() -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    played = Played(model, 1)

    def loss(m: nn.Module, _: int) -> torch.Tensor:
        value = (m(torch.arange(48.0).reshape(1, 3, 4, 4)) ** 2).sum()
        assert isinstance(value, torch.Tensor)
        return value

    played.run(loss, [0])
    loss(model, 0)
    weight = dict(model.named_parameters())["weight"]
    played.accumulator.close()
    loss(model, 0).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.equal(played.root()[0][: weight.numel()], weight.grad.permute(0, 2, 3, 1).reshape(-1))


def test_a_narrow_gradient_that_fires_in_parts_is_added_before_it_is_rounded() -> None:
    """A re-entrant layer used twice: the microbatch's gradient is one fp32 sum, rounded once, as PyTorch has it."""
    played = Played(Checkpointed(reentrant=True), 2, torch.bfloat16)
    played.run(checkpointed_loss, range(2))

    expected = by_hand(Checkpointed(reentrant=True), checkpointed_loss, 2, torch.bfloat16)
    assert_same_bits(played.root(), expected)


# ---- the binary counter ----


@given(leaves=st.integers(1, 40), data=st.data())
def test_a_counter_gives_each_wanted_root_once_in_the_trees_order(leaves: int, data: st.DataObject) -> None:
    tree = Tree(leaves)
    mine = data.draw(st.sets(st.integers(0, leaves - 1)))
    counter: Counter[str] = Counter(tree, lambda a, b: f"({a}+{b})")
    counter.begin(tree.cover(mine))
    found: dict[TreeNode, str] = {}
    for leaf in data.draw(st.permutations(sorted(mine))):
        for node, value in counter.carry(TreeNode(leaf, 1), str(leaf)):
            assert node not in found
            found[node] = value

    assert sorted(found) == tree.cover(mine)
    assert found == {node: expression(node) for node in found}
    assert counter.flush() == []


def expression(node: TreeNode) -> str:
    if node.leaves == 1:
        return str(node.first)
    count = 1 << ((node.leaves - 1).bit_length() - 1)
    return (
        f"({expression(TreeNode(node.first, count))}+{expression(TreeNode(node.first + count, node.leaves - count))})"
    )


def test_flushing_gives_what_is_held_by_first_leaf_and_forgets_it() -> None:
    counter: Counter[str] = Counter(Tree(8), lambda a, b: f"({a}+{b})")
    counter.begin([TreeNode(0, 8)])
    for leaf in (6, 0, 1, 2):
        assert counter.carry(TreeNode(leaf, 1), str(leaf)) == []

    assert counter.flush() == [(TreeNode(0, 2), "(0+1)"), (TreeNode(2, 1), "2"), (TreeNode(6, 1), "6")]
    assert counter.flush() == []


def test_summaries_count_the_same_way() -> None:
    counter = Counter(Tree(2), Summary.plus)
    counter.begin([TreeNode(0, 2)])
    counter.carry(TreeNode(1, 1), Summary(loss_sum=0.2, weight=2, samples=1, touched=b"\2"))
    ((node, whole),) = counter.carry(TreeNode(0, 1), Summary(loss_sum=0.1, weight=1, samples=1, touched=b"\1"))

    assert (node, whole) == (TreeNode(0, 2), Summary(loss_sum=0.1 + 0.2, weight=3, samples=2, touched=b"\3"))
