"""What happens to a model before step 0: lazy modules get their shapes, the spec freezes, memory stays shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pscluster.errors import LayoutError, SpecError, TaskError
from pscluster.task import Task
from psworker.replica import Replica, layout_of
from psworker.trainer.data.loading import build_model
from psworker.trainer.first_model import settle_model
from psworker.trainer.preflight.prepare import prepare
from psworker.trainer.preflight.table import checks_of


class Images(Task):
    """A model of lazy modules, with dropout and statistics."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.LazyConv2d(3, 2), nn.LazyBatchNorm2d(), nn.Flatten(), nn.Dropout(), nn.LazyLinear(4), nn.Linear(4, 1)
        )

    def train_data(self) -> Any:
        return [torch.full((1, 4, 4), float(i)) for i in range(20)]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return model(batch).square().sum(), len(batch)


class Linears(Images):
    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2), nn.Linear(2, 1))


def settled(task: Task, spec: Any) -> tuple[nn.Module, str]:
    return settle_model(task, build_model(task), task.train_data(), spec, "cpu")


def settled_with(spec: Any) -> tuple[dict[str, bool], str]:
    model, detail = settled(Linears(), spec)
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}, detail


# ---- lazy modules ----


def test_lazy_modules_get_the_same_values_every_time_and_statistics_stay_as_built(make_spec: Any) -> None:
    torch.manual_seed(8)
    one, _ = settled(Images(), make_spec())
    torch.manual_seed(9)
    other, _ = settled(Images(), make_spec())

    assert type(one[0]) is nn.Conv2d and type(one[4]) is nn.Linear  # type: ignore[index]
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert not one[1].running_mean.any() and one[1].num_batches_tracked == 0  # type: ignore[index, union-attr, operator]
    assert one.training and all(parameter.grad is None for parameter in one.parameters())


def test_a_lazy_model_is_prepared(make_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psworker.trainer.preflight.prepare.load_task", lambda *_: Images())
    prepared = prepare(make_spec(), None, "cpu")

    table = {check.name: check.detail for check in prepared.preflight.checks}
    assert table["task"] == "Sequential with 5 parameters, 6 tensors lazy"
    assert table["trainable"] == "8 of 8 parameters train"
    fresh, _ = settled(Images(), make_spec())
    assert Replica(prepared.model, make_spec().train.optimizer).sha256() == (
        Replica(fresh, make_spec().train.optimizer).sha256()
    ), "the preflight leaves no trace"


def test_a_loss_that_cannot_give_shapes_is_the_tasks_error(make_spec: Any) -> None:
    class Broken(Images):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            raise ValueError(f"no such layer for {len(batch)} in {model}")

    with pytest.raises(TaskError, match="gives lazy modules their shapes, raised ValueError: no such layer"):
        settled(Broken(), make_spec())


def test_a_lazy_module_that_no_loss_uses_is_named(make_spec: Any) -> None:
    class Unused(Images):
        def build_model(self) -> nn.Module:
            model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
            model[1].register_module("spare", nn.LazyLinear(2))
            return model

    model, _ = settled(Unused(), make_spec())
    with pytest.raises(LayoutError, match=r"1\.spare\.weight is lazy"):
        layout_of(model, make_spec().train.optimizer)


# ---- freezing ----


def test_patterns_freeze_and_thaw_by_name(make_spec: Any) -> None:
    trains, detail = settled_with(make_spec(train={"freeze": ["1.*"], "unfreeze_at": {"2.*": 5, "*.bias": 3}}))

    assert trains == {
        "1.weight": False, "1.bias": False, "2.weight": False, "2.bias": False, "3.weight": True, "3.bias": False,
    }  # fmt: skip
    assert detail == "1 of 6 parameters train, 3 more from step 3 on, 1 more from step 5 on, 1 is frozen"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            {"freeze": ["2.wieght"]},
            "train.freeze: '2.wieght' matches no parameter of the model; did you mean 2.weight?",
        ),
        ({"unfreeze_at": {"7.*": 2}}, "train.unfreeze_at: '7.*' matches no parameter of the model"),
        ({"freeze": ["1.*", "encoder"]}, "train.freeze: 'encoder' matches no"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(make_spec: Any, train: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        settled_with(make_spec(train=train))
    assert caught.value.cause.startswith(said)


def test_a_pattern_that_matches_nothing_is_a_line_of_the_table(make_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psworker.trainer.preflight.prepare.load_task", lambda *_: Linears())
    with pytest.raises(SpecError) as caught:
        prepare(make_spec(train={"freeze": ["x"]}), None, "cpu")
    failed = [check.name for check in checks_of(caught.value) if not check.ok]
    assert failed == ["trainable"]


@pytest.mark.parametrize("glob", ["0.weight", "1.weight"])
def test_shared_memory_is_frozen_by_any_of_its_names(make_spec: Any, glob: str) -> None:
    class Tied(Images):
        def build_model(self) -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model[1].weight.data = model[0].weight.data
            return model

    model, detail = settled(Tied(), make_spec(train={"freeze": [glob]}))
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, True]
    assert detail == "2 of 3 parameters train, 1 is frozen"


# ---- shared memory, and the way to the device ----


def test_memory_stays_shared_on_the_way_to_a_device(make_spec: Any) -> None:
    class Tied(Images):
        def build_model(self) -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
            model[1].weight.data = model[0].weight.data
            # As a device of its own does: every parameter gets new memory.
            model.to = lambda _: model._apply(torch.clone)  # type: ignore[assignment, method-assign, misc]
            return model

    model, _ = settled(Tied(), make_spec())
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()  # type: ignore[index, union-attr, operator]


def test_memory_shared_in_part_is_named_before_the_model_moves(make_spec: Any) -> None:
    class Torn(Images):
        def build_model(self) -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
            model[1].weight.data = model[0].weight.data[:2]
            return model

    with pytest.raises(LayoutError, match=r"0\.weight and the parameter 1\.weight share"):
        settled(Torn(), make_spec())


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_a_model_that_cannot_be_laid_out_fails_its_own_check_at_once(
    make_spec: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    class Odd(Images):
        def build_model(self) -> nn.Module:
            if kind == "meta":
                with torch.device("meta"):
                    return nn.Linear(1, 1)
            model = nn.Linear(1, 1)
            model.table = nn.Parameter(torch.eye(3).to_sparse())
            return model

    monkeypatch.setattr("psworker.trainer.preflight.prepare.load_task", lambda *_: Odd())
    with pytest.raises(LayoutError) as caught:
        prepare(make_spec(), None, "cpu")
    assert [check.name for check in checks_of(caught.value) if not check.ok] == ["task"]
    assert "traceback" not in caught.value.details


def test_a_parameter_that_forward_makes_is_named_before_step_0(make_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Linears):
        def loss(self, model: Any, batch: Any) -> Any:
            if not hasattr(model[1], "scale"):
                model[1].scale = nn.Parameter(torch.ones(1))
            loss, weight = super().loss(model, batch)
            return loss * model[1].scale.sum(), weight

    monkeypatch.setattr("psworker.trainer.preflight.prepare.load_task", lambda *_: Late())
    with pytest.raises(LayoutError, match=r"forward adds the parameter 1\.scale"):
        prepare(make_spec(), None, "cpu")
