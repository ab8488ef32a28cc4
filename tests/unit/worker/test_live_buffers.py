"""Buffers between microbatches: what may change does so exactly, what may not is named, caches are scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pscluster.errors import ModelChangedError
from pscluster.job.optimizer import OptimizerSection
from psworker.live_buffers import preserved_buffers
from psworker.replica import Replica

SGD = OptimizerSection(name="sgd")


class Rotary(nn.Module):
    """Caches as they are written: one grows, one is made at the first call, one is None before."""

    cosine: torch.Tensor
    mask: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("cosine", torch.zeros(2), persistent=False)
        self.register_buffer("mask", None, persistent=False)
        self.grown = 0

    def forward(self, x: torch.Tensor) -> Any:
        if len(self.cosine) < len(x):
            self.grown += 1
            self.cosine = torch.arange(len(x)).float()
        if self.mask is None:
            self.mask = torch.ones(len(x), len(x)).tril()
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(1), persistent=False)
        return self.linear(x) + self.cosine[: len(x), None]


def test_caches_outside_the_state_dict_are_the_microbatchs_own() -> None:
    model = Rotary()
    replica = Replica(model, SGD)
    for _ in range(2):
        replica.buffers.restore()
        assert model.cosine.tolist() == [0, 0]
        assert model.mask is None and "late" not in model._buffers
        model(torch.ones(5, 1))
        assert replica.buffers.check() == []
        averaged = next(b.index for b in replica.layout.buckets if b.kind == "averaged")
        assert not replica.buffers.weighted(averaged, 2.0).any(), "committed values stand for what has another shape"
    assert model.grown == 2
    assert {replica.layout.tensors[n].name for n in range(3)} == {"linear.weight", "linear.bias", "cosine"}


def test_a_constant_of_nan_has_not_moved() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.tensor([float("nan"), float("-inf")]))
    buffers = Replica(model, SGD).buffers
    buffers.restore()
    assert buffers.check() == []
    model.mask[0] = 1.0  # type: ignore[index, operator]
    assert len(buffers.check()) == 1


class Holding(nn.Module):
    """One buffer, of the state dict, and what a test does to it."""

    held: torch.Tensor

    def __init__(self, held: torch.Tensor | None) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("held", held)


def resize(model: Any) -> None:
    model.held = torch.zeros(9)


def resize_in_place(model: Any) -> None:
    model.held.resize_(9)


def widen(model: Any) -> None:
    model.held = model.held.double()


def remove(model: Any) -> None:
    del model.held


def add(model: Any) -> None:
    model.register_buffer("late", torch.ones(1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (resize, r"held changed from \[2\] of float32 to \[9\] of float32"),
        (resize_in_place, r"held changed from \[2\] of float32 to \[9\] of float32"),
        (widen, "to .* of float64"),
        (remove, "held is gone"),
        (add, "late was added"),
    ],
)
def test_a_buffer_of_the_state_dict_keeps_its_shape_and_place(change: Callable[[Any], object], said: str) -> None:
    model = Holding(torch.zeros(2))
    buffers = Replica(model, SGD).buffers
    buffers.restore()
    buffers.check()
    change(model)
    with pytest.raises(ModelChangedError, match=said) as caught:
        buffers.check()
    assert "persistent=False" in caught.value.action


def test_a_buffer_of_the_state_dict_that_was_none_and_appears_is_named() -> None:
    model = Holding(None)
    buffers = Replica(model, SGD).buffers
    model.held = torch.ones(1)
    with pytest.raises(ModelChangedError, match="held was added"):
        buffers.check()


MOVES: dict[str, tuple[Callable[[], torch.Tensor], Callable[[Any], object]]] = {
    "float64": (lambda: torch.zeros(3).double(), lambda model: model.held.add_(1)),
    "past torch's count": (lambda: torch.zeros(3).bfloat16(), lambda model: model.held.data.add_(1)),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), lambda model: model.held.add_(1j)),
    "the sign of zero": (lambda: torch.zeros(3).double(), lambda model: model.held.neg_()),
    "replaced": (lambda: torch.zeros(3).half(), lambda model: setattr(model, "held", torch.ones(3).half())),
    "sparse values": (lambda: torch.eye(3).to_sparse(), lambda model: model.held._values().mul_(2)),
    "sparse elements": (lambda: torch.eye(3).to_sparse(), lambda m: setattr(m, "held", torch.eye(3)[:2].to_sparse())),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), lambda model: model.held.values().mul_(2)),
}


@pytest.mark.parametrize("case", MOVES)
def test_a_constant_that_moves_is_named(case: str) -> None:
    build, move = MOVES[case]
    model = Holding(build())
    buffers = Replica(model, SGD).buffers
    buffers.restore()
    buffers.check()
    with torch.no_grad():
        move(model)
    with pytest.raises(ModelChangedError, match="the buffer held changed"):
        buffers.check()


def test_a_constant_that_evaluation_moved_is_put_back_before_the_next_microbatch() -> None:
    model = Holding(torch.tensor([float("nan"), 1.0]).double())
    buffers = Replica(model, SGD).buffers
    for _ in range(2):
        buffers.restore()
        buffers.check()
    buffers.restore()  # of an evaluation
    model.held.fill_(4)
    buffers.restore()
    buffers.check()
    assert model.held[1] == 1.0


def test_an_expanded_buffer_is_given_all_its_elements() -> None:
    model = Holding(torch.ones(1).expand(4))
    model.register_buffer("second", model.held)
    replica = Replica(model, SGD)
    replica.buffers.restore()
    model.held.mul_(2)

    assert model.second is model.held
    assert [replica.layout.tensors[n].names for n in replica.buffers.check()] == [("held", "second")]
    replica.buffers.restore()
    assert model.held.tolist() == [1, 1, 1, 1]


def test_a_buffer_of_two_names_stays_one() -> None:
    model = Holding(torch.ones(1))
    model.register_buffer("second", model.held)
    buffers = Replica(model, SGD).buffers
    model.held = torch.zeros(1)
    with pytest.raises(ModelChangedError, match="held is no longer one tensor with second"):
        buffers.check()


def test_what_runs_the_model_before_training_leaves_its_buffers_as_built() -> None:
    model = nn.Sequential(Rotary(), nn.BatchNorm1d(1))
    cosine, count = model[0].cosine, model[1].num_batches_tracked
    with preserved_buffers(model):
        model(torch.ones(6, 1))
        assert len(model[0].cosine) == 6  # type: ignore[arg-type]
    assert model[0].cosine is cosine and model[0].mask is None and "late" not in model[0]._buffers
    assert model[1].num_batches_tracked is count and count == 0
    assert model[1].running_mean is not None and not model[1].running_mean.any()


def test_a_cache_that_is_resized_in_place_begins_anew() -> None:
    model = Rotary()
    buffers = Replica(model, SGD).buffers
    for _ in range(2):
        buffers.restore()
        assert model.cosine.tolist() == [0, 0]
        model.cosine.resize_(7).fill_(1)
        assert buffers.check() == []


def test_a_buffer_that_forward_replaces_by_an_expanded_one_is_restored() -> None:
    model = Holding(torch.zeros(3))
    buffers = Replica(model, SGD).buffers
    buffers.restore()
    model.held = torch.ones(1).expand(3)
    assert len(buffers.check()) == 1
    buffers.restore()
    assert model.held.tolist() == [0, 0, 0]
