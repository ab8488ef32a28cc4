"""A model bound to flat memory: every tensor found once with all its names, values land in place, digests agree."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pscluster.errors import LayoutError, ModelChangedError
from pscluster.job.optimizer import OptimizerSection
from pscluster.step.layout import Layout, parameters_sha256
from psworker.replica import BucketMemory, Replica, layout_of, load_words, named_bytes, state_tensors
from psworker.tensor_words import tensor_view

SGD = OptimizerSection(name="sgd")


class Model(nn.Module):
    """Tied and frozen parameters, buffers of several types, one not in the state dict, a module used twice."""

    mask: torch.Tensor
    scratch: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.alias = self.norm
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.narrow = nn.Parameter(torch.randn(3).bfloat16(), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.register_buffer("nothing", None)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out = self.head(self.norm(self.embedding(rows)))
        assert isinstance(out, torch.Tensor)
        return out


def kinds(model: nn.Module) -> dict[str, str]:
    return {t.name: t.kind for t in layout_of(model, SGD).tensors}


def words_of(replica: Replica) -> list[bytearray]:
    return [bytearray(flat.numpy().tobytes()) for flat in replica.flats]


# ---- the layout of a model ----


def test_every_tensor_is_found_once_by_kind_with_all_its_names() -> None:
    layout = layout_of(Model(), SGD)
    names = {t.name: t.names for t in layout.tensors}

    assert kinds(Model()) == {
        "frozen": "frozen", "narrow": "frozen", "mask": "carried", "scratch": "averaged",
        "embedding.weight": "trained", "norm.weight": "trained", "norm.bias": "trained",
        "norm.running_mean": "averaged", "norm.running_var": "averaged", "norm.num_batches_tracked": "carried",
        "head.bias": "trained",
    }  # fmt: skip
    assert names["embedding.weight"] == ("embedding.weight", "head.weight")
    assert names["norm.running_mean"] == ("norm.running_mean", "alias.running_mean")
    assert [t.name for t in layout.tensors if not t.persistent] == ["scratch"]


def test_two_builds_of_one_model_have_one_layout() -> None:
    assert layout_of(Model(), SGD).sha256 == layout_of(Model(), SGD).sha256


@pytest.mark.parametrize(
    ("section", "decayed"),
    [
        ({}, {"embedding.weight"}),
        ({"decay_norms_and_biases": True}, {"embedding.weight", "norm.weight", "norm.bias", "head.bias"}),
        ({"decay_norms_and_biases": True, "no_decay": ["*.bias"]}, {"embedding.weight", "norm.weight"}),
        ({"no_decay": ["head.*"]}, set()),
    ],
    ids=["matrices", "all", "no biases", "by an alias"],
)
def test_decay_is_for_matrices_by_default(section: dict[str, Any], decayed: set[str]) -> None:
    layout = layout_of(Model(), OptimizerSection(weight_decay=0.1, **section))

    assert {t.name for t in layout.tensors if t.decay} == decayed


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.ReLU(), "no trainable parameter"),
        (nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
        (nn.Linear(2, 2).double(), "weight is float64"),
        (nn.Linear(2, 2).half(), "weight is float16"),
        (nn.Linear(2, 2, dtype=torch.complex64), "weight is complex64"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).half()), r"1.weight is float16"),
        (nn.LazyLinear(3), "weight is lazy"),
    ],
)
def test_what_cannot_be_trained_exactly_is_refused_by_name(model: nn.Module, said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        layout_of(model, SGD)


# ---- bound to flat memory ----


def test_binding_changes_no_value_and_computes_the_same() -> None:
    plain, bound = Model(), Model()
    Replica(bound, SGD)

    for (name, one), (_, other) in zip(plain.state_dict().items(), bound.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    rows = torch.tensor([1, 5, 6])
    assert torch.equal(plain(rows), bound(rows))


def test_values_that_land_in_the_flats_are_the_parameters() -> None:
    model = Model()
    replica = Replica(model, SGD)
    for flat in replica.flats[:1]:
        flat.fill_(0.25)

    assert model.embedding.weight.unique().tolist() == [0.25]
    assert model.head.weight is model.embedding.weight, "ties hold"
    assert model.norm.bias.unique().tolist() == [0.25]


def test_gradients_flow_to_bound_parameters() -> None:
    model = Model()
    replica = Replica(model, SGD)
    model(torch.tensor([1, 2, 3])).sum().backward()  # type: ignore[no-untyped-call]

    assert {replica.layout.tensors[n].name for n in replica.parameters.values()} == {
        "embedding.weight", "norm.weight", "norm.bias", "head.bias",
    }  # fmt: skip
    assert all(p.grad is not None for p in replica.parameters)


def test_buffers_are_the_modules_own_until_restored() -> None:
    model = Model()
    replica = Replica(model, SGD)
    committed = [flat.clone() for flat in replica.flats]
    model(torch.tensor([1, 2, 3]))
    moved = {replica.layout.tensors[n].name for n in replica.buffers.check()}

    assert moved == {"norm.running_mean", "norm.running_var"}, "integer ones are not averaged"
    assert all(torch.equal(a, b) for a, b in zip(committed, replica.flats, strict=True))
    assert model.norm.num_batches_tracked == 1
    replica.buffers.restore()
    assert replica.buffers.check() == []
    assert model.norm.num_batches_tracked == 0


def test_a_buffer_that_the_model_replaces_is_still_found() -> None:
    """`self.mask = ...` puts another tensor in the same place."""
    model = Model()
    replica = Replica(model, SGD)
    model.scratch = torch.ones(2)
    model.mask = ~model.mask

    assert [replica.layout.tensors[n].name for n in replica.buffers.check()] == ["scratch"]
    replica.buffers.restore()
    assert model.mask.tolist() == [True, False, True]
    assert replica.buffers.check() == []


def test_a_buffer_of_the_state_dict_that_changes_its_shape_is_refused_by_name() -> None:
    model = Model()
    replica = Replica(model, SGD)
    model.mask = torch.ones(2, dtype=torch.bool)

    with pytest.raises(ModelChangedError, match=r"mask changed from \[3\] of bool to \[2\]"):
        replica.buffers.restore()


def test_weighted_and_carried_words_have_zeros_between_tensors() -> None:
    model = Model()
    replica = Replica(model, SGD)
    averaged, carried = (next(b for b in replica.layout.buckets if b.kind == k) for k in ("averaged", "carried"))
    model(torch.tensor([1, 2, 3]))
    words = replica.buffers.weighted(averaged.index, 2.5)
    raw = replica.buffers.carried(carried.index)

    for bucket, flat, live in ((averaged, words, 2.5), (carried, raw, None)):
        flats = [*replica.flats[: bucket.index], flat, *replica.flats[bucket.index + 1 :]]
        rest = flat.clone()
        for place in bucket.placed:
            spec = replica.layout.tensors[place.tensor]
            want = model.get_buffer(spec.name)
            want = want * live if live is not None else want
            assert torch.equal(tensor_view(replica.layout, flats, place.tensor), want), spec.name
            rest[place.offset : place.offset + spec.num_words] = 0
        assert not rest.any()


# ---- state, snapshots, digests ----


def test_the_state_is_the_state_dict_aliases_and_all() -> None:
    model = Model()
    replica = Replica(model, SGD)
    state = state_tensors(replica.layout, replica.flats)

    expected = model.state_dict()
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert state.keys() >= {"head.weight", "embedding.weight", "alias.running_mean"}


def test_a_snapshots_words_are_the_same_state_and_load_into_another_model() -> None:
    replica = Replica(Model(), SGD)
    words = words_of(replica)
    other = Model()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()

    load_words(other, replica.layout, words)

    for name, tensor in state_tensors(replica.layout, words).items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert torch.equal(other.scratch, replica.model.scratch), "also what the state dict leaves out"  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"shape": (7, 5)}, {"names": ("gone",)}])
def test_words_that_do_not_fit_a_model_are_refused_by_name(change: dict[str, Any]) -> None:
    replica = Replica(Model(), SGD)
    number = next(n for n, t in enumerate(replica.layout.tensors) if t.name == "embedding.weight")
    tensors = list(replica.layout.tensors)
    tensors[number] = replace(tensors[number], **change)
    other = Layout(tuple(tensors))
    words = [bytearray(4 * bucket.num_words) for bucket in other.buckets]

    with pytest.raises(LayoutError, match=r"embedding\.weight is|gone is"):
        load_words(Model(), other, words)


def test_the_digest_is_that_of_the_state_dict() -> None:
    replica = Replica(Model(), SGD)
    digest = replica.sha256()

    assert digest == parameters_sha256(named_bytes(Model().state_dict()))
    assert digest == parameters_sha256(named_bytes(state_tensors(replica.layout, words_of(replica))))
    replica.flats[0][0] += 1
    assert replica.sha256() != digest


def test_the_digest_does_not_see_memory_order_or_padding() -> None:
    model = nn.Conv2d(3, 4, 2)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    assert Replica(model, SGD).sha256() == Replica(other, SGD).sha256()
    assert Replica(model, SGD).sha256() == parameters_sha256(named_bytes(model.state_dict()))


def test_a_tensor_without_elements_is_viewed_as_such() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 0))
    replica = Replica(model, SGD)
    state = state_tensors(replica.layout, replica.flats)

    assert state["1.weight"].shape == (0, 3)
    assert replica.sha256() == parameters_sha256(named_bytes(model.state_dict()))


def test_empty_memory_has_words_of_each_kind() -> None:
    layout = layout_of(Model(), SGD)
    flats = BucketMemory(layout).flats

    for bucket, flat in zip(layout.buckets, flats, strict=True):
        assert flat.dtype == (torch.float32 if bucket.kind in ("trained", "averaged") else torch.int32)
        assert flat.numel() == bucket.num_words and not flat.any()
