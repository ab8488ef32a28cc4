"""The update of a step against torch's own optimizers, bit for bit, however the parameters are dealt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

import pscluster.step.layout
from harness.played import played_spec
from pscluster.job.optimizer import OptimizerSection
from pscluster.job.schedule import learning_rate
from pscluster.job.spec import JobSpec
from pscluster.step.codec import DTYPES
from pscluster.step.layout import BLOCK_WORDS, Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode, touched_bits
from pscluster.v1.plan_pb2 import Plan
from psserver.partition.coordinator.coordinator import decide
from psserver.partition.step.kernels import moments_of
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.optimizer import CHUNK_WORDS, Run, runs
from psserver.partition.step.state import PartitionState
from psserver.partition.step.voting import CommitDecision, Vote

SHAPES = [(CHUNK_WORDS + 3 * BLOCK_WORDS + 5,), (7,), (33, 3), (1000,), (BLOCK_WORDS + 1, 2), (1,)]
DECAY = [True, False, True, False, True, False]
STEPS = 3
NORMS: dict[tuple[int, bool, str], list[float]] = {}  # by how gradients are dealt to blocks, and which there are


def tensor(number: int) -> TensorSpec:
    return TensorSpec(names=(f"w{number}",), shape=SHAPES[number], dtype="float32", kind="trained", decay=DECAY[number])


@pytest.fixture(params=[1 << 20, 1 << 17], ids=["one bucket", "several buckets"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr(pscluster.step.layout, "BUCKET_WORDS", request.param)
    return Layout(tuple(tensor(n) for n in range(len(SHAPES))))


def drawn(seed: int) -> list[torch.Tensor]:
    """Numbers of very different sizes, some of them zero; the caller's own."""
    return [values.clone() for values in _drawn(seed)]


@lru_cache
def _drawn(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in SHAPES:
        values = torch.randn(shape, generator=generator) * 10 ** torch.randint(-6, 3, shape, generator=generator)
        found.append(values * (torch.rand(shape, generator=generator) > 0.05))
    return tuple(found)


def touched_at(step: int, sometimes: bool) -> list[bool]:
    """Tensors 1 and 2 are not always touched; nor is tensor 2 at first."""
    return [n not in (1, 2) or not sometimes or (step + n) % 2 == 1 for n in range(len(SHAPES))]


def flat(layout: Layout, bucket: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A bucket's words from its tensors."""
    words = torch.zeros(layout.buckets[bucket].num_words)
    for placed in layout.buckets[bucket].placed:
        values = tensors[placed.tensor].reshape(-1)
        words[placed.offset : placed.offset + values.numel()] = values
    return words


class PlayedPartition:
    """One partition's state and open step, fed by hand with whole-step gradients (one shard)."""

    def __init__(self, layout: Layout, spec: JobSpec, index: int, count: int) -> None:
        self.layout = layout
        self.state = PartitionState.empty(layout, index, count, moments_of(spec.train.optimizer))
        self.step = OpenStep(self.state, spec, STEPS)
        for span in self.state.spans:
            values = flat(layout, span.bucket, drawn(0))
            self.state.values[span.bucket].copy_(values[span.start : span.stop])

    def push(self, gradients: Sequence[torch.Tensor], summary: Summary) -> None:
        for span in self.state.spans:
            if span.num_words:
                words = self.step.pool.take(span.num_words)
                words.copy_(flat(self.layout, span.bucket, gradients)[span.start : span.stop])
                assert self.step.offer_trained(span.bucket, TreeNode(0, 1), words, partial(self.step.pool.give, words))
        assert self.step.offer_summary(TreeNode(0, 1), summary)
        assert self.step.is_complete

    def carry_out(self, decision: CommitDecision) -> None:
        self.step.decide(decision)
        while self.step.next_update() is not None:
            self.step.update()


def ours(layout: Layout, spec: JobSpec, count: int, sometimes: bool) -> list[torch.Tensor]:
    """The tensors after a few steps over `count` partitions."""
    partitions = [PlayedPartition(layout, spec, index, count) for index in range(count)]
    norms = []
    for step in range(STEPS):
        touched = touched_at(step, sometimes)
        gradients = [g if hit else torch.zeros_like(g) for g, hit in zip(drawn(step + 1), touched, strict=True)]
        bits = touched_bits([n for n, hit in enumerate(touched) if hit], len(SHAPES))
        summary = Summary(loss_sum=1.0, weight=3.0, samples=3, touched=bits)
        votes: dict[int, Vote] = {}
        for index, partition in enumerate(partitions):
            partition.push(gradients, summary)
            squares, finite = partition.step.make_vote()
            votes[index] = Vote(generation=1, step=step, partition=index, squares=squares, finite=finite)
        decision = decide(votes, summary, spec, Plan(final_step=STEPS, generation=1, stop=False))
        norms.append(decision.norm)
        for partition in partitions:
            partition.carry_out(decision)
    known = NORMS.setdefault(norms_key(layout, spec, sometimes), norms)
    assert norms == known, "the norm depends on the number of partitions"
    assert len({tuple(p.state.update_counts) for p in partitions}) == 1
    return gathered(layout, [p.state for p in partitions])


def norms_key(layout: Layout, spec: JobSpec, sometimes: bool) -> tuple[int, bool, str]:
    return (len(layout.buckets), sometimes, spec.network.push_codec)


def gathered(layout: Layout, states: Sequence[PartitionState]) -> list[torch.Tensor]:
    """The tensors that the partitions hold between them."""
    found: dict[int, torch.Tensor] = {}
    for bucket in layout.buckets:
        words = torch.full((bucket.num_words,), float("nan"))
        for state in states:
            span = state.spans[bucket.index]
            words[span.start : span.stop] = state.values[bucket.index]
        for placed in bucket.placed:
            spec = layout.tensors[placed.tensor]
            end = placed.offset + spec.num_elements
            found[placed.tensor] = words[placed.offset : end].reshape(spec.shape)
            padding = words[end : -(-end // 16) * 16]
            assert torch.equal(padding, torch.zeros_like(padding)), "padding stays zero"
    return [found[n] for n in sorted(found)]


def padded(values: torch.Tensor) -> torch.Tensor:
    """The elements, and zeros to a multiple of 16: torch's kernels round the odd ones at the end in another way."""
    return torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % 16))


def plain(values: torch.Tensor) -> torch.Tensor:
    return values


def torchs(spec: JobSpec, sometimes: bool, norms: Sequence[float], shaped: Any) -> list[torch.Tensor]:
    """The same by torch: an optimizer for each parameter, so that each has its own first step.

    Gradients are what they are on the wire, and fp32 from there on."""
    section, dtype = spec.train.optimizer, DTYPES[spec.network.push_codec]
    parameters = [torch.nn.Parameter(shaped(values)) for values in drawn(0)]
    optimizers = [_torch_optimizer(section, [p], decay) for p, decay in zip(parameters, DECAY, strict=True)]
    for step in range(STEPS):
        clip = 1.0 if spec.train.clip_norm is None else min(1.0, spec.train.clip_norm / (norms[step] + 1e-6))
        lr = learning_rate(section.lr, spec.train.schedule, step, STEPS)
        hits = touched_at(step, sometimes)
        for parameter, optimizer, gradient, hit in zip(parameters, optimizers, drawn(step + 1), hits, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            parameter.grad = shaped(gradient.to(dtype).float().mul_(clip / 3.0)) if hit else None
            optimizer.step()
    found = zip(parameters, SHAPES, strict=True)
    return [p.detach().reshape(-1)[: torch.Size(shape).numel()].reshape(shape) for p, shape in found]


class _Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al., 2023, line by line."""

    def __init__(self, params: list[Any], **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002 - torch's signature
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = -p.grad if group["maximize"] else p.grad
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                update = gradient.lerp(mean, beta1).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                mean.copy_(mean.lerp(gradient, 1 - beta2))


_CLASSES: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rprop": torch.optim.Rprop,
    "lion": _Lion,
}
_FUSED = {"adamw", "adam", "sgd", "adagrad"}


def _torch_optimizer(section: OptimizerSection, parameters: list[Any], decay: bool) -> torch.optim.Optimizer:
    """The class of torch with the section's arguments under their own names."""
    arguments = {key: getattr(section, key) for key in section.own_keys}
    if not decay and "weight_decay" in arguments:
        arguments["weight_decay"] = 0.0
    if section.name in _FUSED:
        arguments["fused"] = True
    made: torch.optim.Optimizer = _CLASSES[section.name](parameters, lr=section.lr, **arguments)
    return made


OPTIMIZERS: dict[str, Mapping[str, Any]] = {
    "adamw": {"name": "adamw", "weight_decay": 0.1},
    "adam": {"name": "adam", "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6},
    "sgd": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01},
    "momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "nesterov": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampened": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True},
    "amsgrad": {"name": "adamw", "amsgrad": True, "weight_decay": 0.1},
    "adam amsgrad": {"name": "adam", "amsgrad": True, "maximize": True},
    "rmsprop": {"name": "rmsprop", "weight_decay": 0.01},
    "rmsprop centered": {"name": "rmsprop", "centered": True, "momentum": 0.9, "alpha": 0.9},
    "adagrad": {"name": "adagrad", "lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.01},
    "adadelta": {"name": "adadelta", "rho": 0.8, "weight_decay": 0.01},
    "adamax": {"name": "adamax", "weight_decay": 0.01},
    "nadam": {"name": "nadam", "weight_decay": 0.01},
    "nadam decoupled": {"name": "nadam", "weight_decay": 0.1, "decoupled_weight_decay": True},
    "radam": {"name": "radam", "weight_decay": 0.01, "betas": [0.9, 0.9]},
    "rprop": {"name": "rprop", "etas": [0.4, 1.3]},
    "lion": {"name": "lion", "weight_decay": 0.1},
}


def assert_torchs_bits(layout: Layout, spec: JobSpec, sometimes: bool) -> None:
    """One partition gives torch's bits, and 2 and 3 give those of one."""
    one = ours(layout, spec, 1, sometimes)
    norms = NORMS[norms_key(layout, spec, sometimes)]
    for number, (mine, exact) in enumerate(zip(one, torchs(spec, sometimes, norms, padded), strict=True)):
        assert torch.equal(mine, exact), f"tensor {number}: {(mine - exact).abs().max()}"
    torch.testing.assert_close(one, torchs(spec, sometimes, norms, plain), rtol=1e-6, atol=1e-6)
    for count in (2, 3):
        for mine, other in zip(one, ours(layout, spec, count, sometimes), strict=True):
            assert torch.equal(mine.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("sometimes", [False, True], ids=["all touched", "some untouched"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_number_of_partitions_gives_torchs_bits(optimizer: str, sometimes: bool, layout: Layout) -> None:
    schedule = {"name": "cosine", "warmup_steps": 2}
    train = {"optimizer": OPTIMIZERS[optimizer], "schedule": schedule, "clip_norm": 0.7 if sometimes else None}

    assert_torchs_bits(layout, played_spec(1, train=train), sometimes)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_narrow_gradient_is_widened_before_anything_is_computed_from_it(optimizer: str, layout: Layout) -> None:
    """With push codec bf16: torch's bits on the widened gradient, and the norm of what was pushed."""
    train = {"optimizer": OPTIMIZERS[optimizer], "clip_norm": 0.7}
    spec = played_spec(1, train=train, network={"push_codec": "bf16"})

    assert_torchs_bits(layout, spec, True)

    exact = played_spec(1, train=train)
    ours(layout, exact, 1, True)
    assert NORMS[norms_key(layout, spec, True)] != NORMS[norms_key(layout, exact, True)], "it was rounded"


def test_one_torch_optimizer_with_two_groups_is_the_same(layout: Layout) -> None:
    """As people write it: decay on matrices, none on the rest."""
    spec = played_spec(1, train={"optimizer": OPTIMIZERS["adamw"]})
    parameters = [torch.nn.Parameter(padded(values)) for values in drawn(0)]
    decayed = [p for p, decay in zip(parameters, DECAY, strict=True) if decay]
    rest = [p for p, decay in zip(parameters, DECAY, strict=True) if not decay]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, drawn(step + 1), strict=True):
            parameter.grad = padded(gradient.mul_(1 / 3.0))
        optimizer.step()

    for mine, other in zip(ours(layout, spec, 3, False), parameters, strict=True):
        assert torch.equal(padded(mine), other)


def test_groups_are_torchs_param_groups(layout: Layout) -> None:
    """The first group that matches; a group's own decay is in force for its norms and biases, too."""
    names = [layout.tensors[number].name for number in range(len(SHAPES))]
    groups = [{"match": [names[0]], "lr": 1e-2, "weight_decay": 0.3}, {"match": [names[0], names[1]], "lr": 0.0}]
    spec = played_spec(1, train={"optimizer": {**OPTIMIZERS["adamw"], "groups": groups}, "clip_value": 0.2})
    parameters = [torch.nn.Parameter(padded(values)) for values in drawn(0)]
    rest = [{"params": [p], "weight_decay": 0.1 * decay} for p, decay in zip(parameters, DECAY, strict=True)]
    rest[0] |= {"lr": 1e-2, "weight_decay": 0.3}
    rest[1] |= {"lr": 0.0}
    optimizer = torch.optim.AdamW(rest, lr=1e-3, fused=True)
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, drawn(step + 1), strict=True):
            parameter.grad = padded(gradient.mul_(1 / 3.0))
        torch.nn.utils.clip_grad_value_(parameters, 0.2)
        optimizer.step()

    for mine, other in zip(ours(layout, spec, 3, False), parameters, strict=True):
        assert torch.equal(padded(mine), other)


# ---- runs ----


@pytest.fixture
def run_layout(monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr(pscluster.step.layout, "BLOCK_WORDS", 32)
    kinds = [("a", 10, True), ("b", 20, True), ("c", 5, False), ("d", 16, False), ("e", 1, True)]
    return Layout(
        tuple(
            TensorSpec(names=(name,), shape=(size,), dtype="float32", kind="trained", decay=decay)
            for name, size, decay in kinds
        )
    )


ALL = [True] * 5
NO_GROUPS = [-1] * 5


def test_neighbours_that_share_decay_and_age_go_together(run_layout: Layout) -> None:
    span = run_layout.span(0, 0, 1)

    assert runs(run_layout, span, [0] * 5, ALL, NO_GROUPS) == [
        Run(0, 48, 0, True),
        Run(48, 80, 0, False),
        Run(80, 96, 0, True),
    ]
    assert runs(run_layout, span, [3, 4, 0, 0, 0], ALL, NO_GROUPS)[:2] == [Run(0, 16, 3, True), Run(16, 48, 4, True)]


def test_neighbours_of_different_groups_are_apart(run_layout: Layout) -> None:
    found = runs(run_layout, run_layout.span(0, 0, 1), [0] * 5, ALL, [-1, 0, -1, -1, 0])

    assert [(run.start, run.group) for run in found] == [(0, -1), (16, 0), (48, -1), (80, 0)]


def test_untouched_tensors_are_left_out_and_part_their_neighbours(run_layout: Layout) -> None:
    span = run_layout.span(0, 0, 1)

    assert runs(run_layout, span, [0] * 5, [True, True, True, False, True], NO_GROUPS)[1:] == [
        Run(48, 64, 0, False),
        Run(80, 96, 0, True),
    ]
    assert runs(run_layout, span, [0] * 5, [False] * 5, NO_GROUPS) == []


def test_the_runs_of_all_spans_are_the_buckets(run_layout: Layout) -> None:
    """Each word is in one run, whatever the number of partitions; runs count from the span's start."""
    whole = runs(run_layout, run_layout.span(0, 0, 1), [0] * 5, ALL, NO_GROUPS)
    for count in (2, 3, 5):
        words: dict[int, tuple[int, bool]] = {}
        for partition in range(count):
            span = run_layout.span(0, partition, count)
            for run in runs(run_layout, span, [0] * 5, ALL, NO_GROUPS):
                assert run.start % 16 == 0
                for word in range(span.start + run.start, span.start + run.stop):
                    assert words.setdefault(word, (run.update_count, run.decay)) == (run.update_count, run.decay)
        assert words == {word: (run.update_count, run.decay) for run in whole for word in range(run.start, run.stop)}


@pytest.mark.parametrize(
    ("section", "moments"),
    [
        ({}, 2),
        ({"name": "adam"}, 2),
        ({"name": "adam", "amsgrad": True}, 3),
        ({"name": "sgd"}, 0),
        ({"name": "sgd", "momentum": 0.5}, 1),
        ({"name": "sgd", "groups": [{"match": ["*.weight"], "momentum": 0.5}]}, 1),
        ({"name": "rmsprop"}, 1),
        ({"name": "rmsprop", "centered": True, "momentum": 0.5}, 3),
        ({"name": "lion"}, 1),
    ],
)
def test_an_optimizer_says_how_much_state_it_needs(section: dict[str, Any], moments: int) -> None:
    assert moments_of(OptimizerSection(**section)) == moments
