"""A model that changes while it trains is found in the same microbatch, by name and step, or is put right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from pscluster.errors import ModelChangedError
from pscluster.job.optimizer import OptimizerSection
from psworker.replica import Replica
from psworker.trainer.model_watch import ModelWatch

SGD = OptimizerSection(name="sgd")


def net() -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    return model


def watched(model: nn.Module, change: Callable[[Any], object] = lambda _: None, *, version: int = 6) -> None:
    """One microbatch of a bound model, as the trainer does it: `change` is what forward does."""
    watch = ModelWatch(Replica(model, SGD))
    watch.begin(version)
    model(torch.randn(4, 3))
    change(model)
    watch.check_parameters(version)
    watch.moved_buffers(version)


def swap(model: Any) -> None:
    model[2].weight.data = torch.ones(3, 3)


def write(model: Any) -> None:
    with torch.no_grad():
        model[2].weight.clamp_(-9, 9)


def shrink(model: Any) -> None:
    model[2].weight.data = model[2].weight.data[:2]


def transpose(model: Any) -> None:
    model[2].weight.data = model[2].weight.data.t()


def renew(model: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def add_parameter(model: Any) -> None:
    model[2].scale = nn.Parameter(torch.ones(3))


def remove_parameter(model: Any) -> None:
    del model[2].bias
    model[2].register_parameter("bias", None)


def narrow(model: Any) -> None:
    model[2].weight.data = model[2].weight.data.bfloat16()


CHANGES: list[tuple[Callable[[Any], object], str]] = [
    (swap, "parameter 2.weight was moved to other memory with other values"),
    (write, "parameter 2.weight was written to"),
    (shrink, "parameter 2.weight changed from"),
    (narrow, "parameter 2.weight changed from"),
    (transpose, "parameter 2.weight was moved"),
    (renew, "parameter 2.weight was replaced"),
    (add_parameter, "parameter 2.scale was added"),
    (remove_parameter, "parameter 2.bias was removed"),
    (lambda model: model[2].bias.requires_grad_(False), "parameter 2.bias no longer requires grad"),
    (lambda model: model[0].weight.requires_grad_(True), "parameter 0.weight requires grad now"),
    (lambda model: model.append(nn.Linear(3, 3)), "module 3 was added"),
    (lambda model: model.pop(2), "module 2 was removed"),
    (lambda model: model[1].add_module("inner", nn.ReLU()), "module 1.inner was added"),
    (lambda model: model.__setitem__(2, nn.Linear(3, 3)), "module 2 was replaced"),
    (lambda model: nn.utils.weight_norm(model[2]), "parameter 2.weight was removed"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_a_change_of_structure_is_named_with_its_step(change: Callable[[Any], object], said: str) -> None:
    with pytest.raises(ModelChangedError, match=said) as caught:
        watched(net(), change)
    assert caught.value.code == "PS-2008"
    assert caught.value.cause.startswith("in step 7 ")
    assert caught.value.details["step"] == "7"
    assert caught.value.details[said.partition(" ")[0]] == said.split()[1]
    assert caught.value.action


def test_thawing_names_the_key_of_the_spec_that_does_it() -> None:
    with pytest.raises(ModelChangedError) as caught:
        watched(net(), lambda model: model[0].requires_grad_(True), version=12)
    assert 'unfreeze_at: {"0.weight": 12}' in caught.value.action


def toggle(model: Any) -> None:
    model[2].requires_grad_(False)
    model[2](torch.randn(2, 3))
    model[2].requires_grad_(True)


def call_with_others(model: Any) -> None:
    functional_call(model, {"2.weight": torch.ones(3, 3)}, torch.randn(2, 3))


@pytest.mark.parametrize("change", [toggle, call_with_others, lambda _: None], ids=["toggled", "functional", "nothing"])
def test_what_is_put_back_within_forward_is_no_change(change: Callable[[Any], object]) -> None:
    watched(net(), change)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_reparametrised_modules_do_not_change(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    norm(model[2])
    watched(model)


def test_equal_values_in_other_memory_are_bound_again() -> None:
    """As flatten_parameters of an LSTM leaves them on CUDA."""
    model = net()
    replica = Replica(model, SGD)
    watch = ModelWatch(replica)
    address = model[2].weight.data_ptr()
    for version in range(2):
        watch.begin(version)
        model[2].weight.data = model[2].weight.data.clone()
        watch.check_parameters(version)
        assert model[2].weight.data_ptr() == address


def test_a_change_between_two_microbatches_is_found_in_the_next() -> None:
    model = net()
    watch = ModelWatch(Replica(model, SGD))
    for version in range(2):
        watch.begin(version)
        watch.check_parameters(version)
    model[2].weight.requires_grad_(False)  # in a hook of backward, or in metrics
    watch.begin(2)
    with pytest.raises(ModelChangedError, match=r"in step 3 the parameter 2\.weight no longer"):
        watch.check_parameters(2)


def test_every_microbatch_begins_in_train_mode_as_the_model_has_it() -> None:
    class Steady(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[1].eval()
            return self

    model = Steady(*net())
    watch = ModelWatch(Replica(model, SGD))
    watch.enter_train_mode()
    model.eval()
    watch.begin(1)
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_values_that_land_are_no_change() -> None:
    model = net()
    replica = Replica(model, SGD)
    watch = ModelWatch(replica)
    watch.begin(0)
    for flat in replica.flats:
        flat.zero_()
    watch.check_parameters(0)


def test_parameters_thaw_as_a_function_of_the_step() -> None:
    model = net()
    replica = Replica(model, SGD, unfreeze_at={"0.*": 3, "2.bias": 5})
    watch = ModelWatch(replica)
    trains = lambda: (model[0].weight.requires_grad, model[2].weight.requires_grad, model[2].bias.requires_grad)  # noqa: E731

    assert {t.name for t in replica.layout.tensors if t.kind == "trained"} >= {"0.weight", "0.bias", "2.bias"}
    seen = {}
    for version in (0, 2, 3, 4, 5, 9, 1):  # back to 1: a restore
        watch.begin(version)
        watch.check_parameters(version)
        seen[version] = trains()
    assert seen == {
        0: (False, True, False), 2: (False, True, False), 3: (True, True, False), 4: (True, True, False),
        5: (True, True, True), 9: (True, True, True), 1: (False, True, False),
    }  # fmt: skip


def test_a_scripted_module_is_watched_too() -> None:
    torch.manual_seed(0)
    inner = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))  # type: ignore[no-untyped-call]
    model = nn.Sequential(inner, nn.Linear(3, 3))
    replica = Replica(model, SGD)
    watch = ModelWatch(replica)
    for version in range(2):
        watch.begin(version)
        model(torch.randn(4, 3))
        watch.check_parameters(version)
        moved = watch.moved_buffers(version)
        assert [replica.layout.tensors[n].name for n in moved] == ["0.1.running_mean", "0.1.running_var"]
    next(inner.parameters()).requires_grad_(False)
    with pytest.raises(ModelChangedError, match=r"parameter 0\.0\.weight no longer"):
        watch.check_parameters(2)
