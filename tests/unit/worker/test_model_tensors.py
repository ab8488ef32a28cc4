"""What of a model has a layout: shared memory, memory formats, constants of any type; what has none is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pscluster.errors import LayoutError
from pscluster.job.optimizer import OptimizerSection
from pscluster.step.layout import Layout, parameters_sha256
from psworker.model_tensors import check_kinds, check_overlaps, check_views
from psworker.replica import Replica, layout_of, load_words, named_bytes, state_tensors
from psworker.trainer.gradients.push import gather

SGD = OptimizerSection(name="sgd")


def tied_through_data() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight.data = model[0].weight.data
    return model


def words_of(replica: Replica) -> list[bytearray]:
    return [bytearray(flat.numpy().tobytes()) for flat in replica.flats]


# ---- shared memory ----


def test_parameters_of_the_same_memory_are_one_tensor() -> None:
    model = tied_through_data()
    replica = Replica(model, SGD)

    assert [t.names for t in replica.layout.tensors] == [("0.weight", "1.weight")]
    assert model[0].weight is not model[1].weight, "whoever holds one of them still does"
    replica.flats[0].fill_(0.5)
    assert model[0].weight.unique().tolist() == model[1].weight.unique().tolist() == [0.5]
    assert list(replica.parameters.values()) == [0, 0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_of_parameters_of_the_same_memory_one_may_be_frozen(frozen: int) -> None:
    model = tied_through_data()
    model[frozen].weight.requires_grad_(False)
    replica = Replica(model, SGD)

    assert replica.layout.tensors[0].kind == "trained"
    assert [p is model[1 - frozen].weight for p in replica.parameters] == [True]
    assert set(replica.trained_buckets()) == {id(model[0].weight), id(model[1].weight)}


def views(one: Any, other: Any) -> nn.Module:
    model = nn.Module()
    model.one, model.other = nn.Parameter(one), nn.Parameter(other)
    return model


BASE = torch.arange(24.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (BASE[:12], BASE[6:18]),
        (BASE.view(4, 6), BASE.view(4, 6).t()),
        (BASE.view(4, 6), BASE),
        (BASE.view(4, 6)[:, :4], BASE.view(4, 6)[:, 3:]),
        (BASE[:8], BASE[:8].view(torch.int32)),
    ],
    ids=["overlap", "transposed", "another shape", "columns", "another dtype"],
)
def test_memory_that_is_shared_in_part_is_refused_by_both_names(one: Any, other: Any) -> None:
    model = nn.Module()
    model.one = nn.Parameter(one)
    model.other = nn.Parameter(other, requires_grad=other.is_floating_point())
    with pytest.raises(LayoutError, match="parameter one and the parameter other share a part") as caught:
        layout_of(model, SGD)
    assert ".clone()" in caught.value.action


@pytest.mark.parametrize(
    ("one", "other"),
    [(BASE[:12], BASE[12:]), (BASE.view(4, 6)[:, :3], BASE.view(4, 6)[:, 3:]), (BASE[::2], BASE[1::2])],
    ids=["behind", "columns", "interleaved"],
)
def test_views_of_one_storage_that_share_no_element_are_two_tensors(one: Any, other: Any) -> None:
    model = views(one, other)
    replica = Replica(model, SGD)

    assert [t.name for t in replica.layout.tensors] == ["one", "other"]
    assert torch.equal(model.one.data, one.clone()) and torch.equal(model.other.data, other.clone())  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("keep", [lambda w: w.data, lambda w: w.t(), lambda w: [w.detach()[0]]])
def test_an_attribute_that_is_a_view_of_a_parameter_is_refused(keep: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    check_views(model)
    model[0].kept = keep(model[0].weight)
    with pytest.raises(LayoutError, match=r"attribute 0\.kept shares the memory of the parameter 0\.weight"):
        check_views(model)


def test_a_buffer_that_is_a_parameters_memory_is_refused_by_both_names() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("first", model.weight.data)
    with pytest.raises(LayoutError, match="parameter weight and the buffer first"):
        check_overlaps(model)
    model.first = model.weight.detach().clone()
    check_overlaps(model)


def test_an_expanded_parameter_is_refused() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(1).expand(4))
    with pytest.raises(LayoutError, match="scale is expanded"):
        layout_of(model, SGD)


# ---- what has no values, or no memory that can be laid out ----


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.ReLU(), nn.Linear(1, 1))


def meta_buffer() -> nn.Module:
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.zeros(3, device="meta"))
    return model


def sparse_parameter() -> nn.Module:
    model = nn.Linear(1, 1)
    model.table = nn.Parameter(torch.eye(3).to_sparse())
    return model


def quantised_buffer() -> nn.Module:
    model = nn.Linear(1, 1)
    model.register_buffer("levels", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (on_meta, "parameter 1.weight is on the meta device"),
        (meta_buffer, "buffer mask is on the meta device"),
        (sparse_parameter, "parameter table is sparse_coo"),
        (quantised_buffer, "buffer levels is quantised"),
    ],
)
def test_what_has_no_layout_is_refused_by_name_with_an_action(build: Any, said: str) -> None:
    with pytest.raises(LayoutError, match=said) as caught:
        check_kinds(build())
    assert caught.value.action


def test_frozen_parameters_may_be_of_any_dtype() -> None:
    model = nn.Linear(2, 2)
    model.base = nn.Parameter(torch.randn(5, 3).bfloat16(), requires_grad=False)
    model.wide = nn.Parameter(torch.randn(3).double(), requires_grad=False)
    model.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64), requires_grad=False)
    model.packed = nn.Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)
    model.small = nn.Parameter(torch.randn(3).to(torch.float8_e4m3fn), requires_grad=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replica = Replica(model, SGD)

    assert {t.name for t in replica.layout.tensors if t.kind == "frozen"} == {
        "base",
        "wide",
        "phase",
        "packed",
        "small",
    }
    assert replica.sha256() == parameters_sha256(named_bytes(before))


# ---- constants ----


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(3, 1)
        dense = torch.randn(4, 6) * (torch.rand(4, 6) > 0.5)
        doubled = torch.tensor([[0, 0, 1], [2, 2, 0]])
        held = {
            "wide": torch.randn(3).double(), "narrow": torch.randn(3, 5).bfloat16(), "short": torch.randn(1).half(),
            "phase": torch.randn(2, dtype=torch.complex64), "turned": torch.randn(2, dtype=torch.complex128).conj(),
            "scalar": torch.tensor(float("nan"), dtype=torch.float64), "coo": dense.to_sparse(),
            "csr": dense.to_sparse_csr(), "csc": dense.double().to_sparse_csc(),
            "bsr": dense.to_sparse_bsr((2, 3)), "bsc": dense.to_sparse_bsc((2, 3)),
            "doubled": torch.sparse_coo_tensor(doubled, torch.randn(3), (4, 4)),
            "none": torch.zeros(3, 3).to_sparse(), "flags": torch.tensor([True, False]), "count": torch.tensor(7),
            "unsigned": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        }  # fmt: skip
        for name, value in held.items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


def test_constants_of_any_dtype_and_layout_are_bytes_that_no_step_changes() -> None:
    layout = layout_of(Constants(), SGD)
    kinds = {t.name: t.kind for t in layout.tensors if not t.name.startswith("linear")}

    assert {name for name, kind in kinds.items() if kind == "carried"} == {"flags", "count", "unsigned"}
    assert {kind for name, kind in kinds.items() if name not in ("flags", "count", "unsigned")} == {"frozen"}
    assert Layout.from_json(layout.to_json()) == layout


def test_constants_come_back_bit_for_bit_from_a_snapshot_and_have_the_state_dicts_digest() -> None:
    replica, other = Replica(Constants(), SGD), Constants()
    digest = parameters_sha256(named_bytes(dict(Constants().state_dict())))
    assert replica.sha256() == digest
    for name in ("wide", "narrow", "phase"):
        other.get_buffer(name).zero_()
    other.get_buffer("coo")._values().zero_()

    load_words(other, replica.layout, words_of(replica))

    assert parameters_sha256(named_bytes(dict(other.state_dict()))) == digest
    state = state_tensors(replica.layout, words_of(replica))
    for name in ("coo", "csr", "csc", "bsr", "bsc", "doubled", "none"):
        mine, built = state[name], Constants().get_buffer(name)
        assert (mine.layout, mine.shape, mine.dtype) == (built.layout, built.shape, built.dtype)
        assert torch.equal(mine.to_dense(), built.to_dense()), name
    assert state["coo"].is_coalesced() and not state["doubled"].is_coalesced()


def test_a_snapshot_with_other_non_zero_elements_is_refused_by_name() -> None:
    replica, other = Replica(Constants(), SGD), Constants()
    other.coo = torch.eye(4, 6).to_sparse()
    with pytest.raises(LayoutError, match="coo has other non-zero elements"):
        load_words(other, replica.layout, words_of(replica))


def test_a_lazy_model_gets_its_shapes_from_a_snapshot() -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.LazyConv2d(3, 2), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))

    x = torch.randn(2, 1, 4, 4)
    first, other = build(), build()
    expected = first.eval()(x)
    replica = Replica(first, SGD)

    load_words(other, replica.layout, words_of(replica))

    assert torch.equal(other.eval()(x), expected)


# ---- memory formats ----


def images() -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten())
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def test_channels_last_parameters_keep_their_format_and_have_the_same_values() -> None:
    plain, bound = images(), images()
    replica = Replica(bound, SGD)

    for (name, one), (_, other) in zip(plain.named_parameters(), bound.named_parameters(), strict=True):
        assert one.stride() == other.stride() and torch.equal(one, other), name
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(x), bound(x))
    assert bound[0](x).is_contiguous(memory_format=torch.channels_last)
    assert [t.form for t in replica.layout.tensors] == ["channels_last", "", "channels_last", "", "channels_last", ""]
    assert replica.sha256() == parameters_sha256(named_bytes(dict(plain.state_dict())))
    assert Layout.from_json(replica.layout.to_json()) == replica.layout


def test_gradients_of_channels_last_parameters_lie_in_the_parameters_order() -> None:
    model = images()
    replica = Replica(model, SGD)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    grads: list[torch.Tensor | None] = [p.grad for p in model.parameters()]
    words = torch.zeros_like(replica.flats[0])
    for start, stop, data in gather(replica.layout, 0, grads):
        words[start:stop] = data

    for parameter, number in replica.parameters.items():
        _, offset = replica.layout.bucket_of[number]
        stride = parameter.stride()
        mine = words[offset : offset + parameter.numel()].as_strided(parameter.shape, stride)
        assert parameter.grad is not None and torch.equal(mine, parameter.grad)
    # Another memory format of a gradient is put in order.
    assert torch.equal(gather(replica.layout, 0, [g.contiguous() for g in grads if g is not None])[0][2], words[:108])


def test_layouts_of_models_without_any_of_this_stay_the_same_bytes() -> None:
    layout = layout_of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), SGD)

    assert b"form" not in layout.to_json().replace(b'"format"', b"") and b"parts" not in layout.to_json()
