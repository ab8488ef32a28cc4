"""What a model or a task keeps of the first batch that it sees, or from one microbatch to the next, is named."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pscluster.errors import ImpureError
from pscluster.task import Task
from psworker.trainer.data.loading import make_task
from tests.unit.worker.test_purity import Line, checks, refused


class ActNorm(nn.Module):
    """Fits shift and scale to the first batch that it sees; `keeps` them as plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.shift: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is None:
            self.shift = x.mean(dim=0, keepdim=True).detach()
        return self.linear(x - self.shift)  # type: ignore[no-any-return]


class KeptByShape(nn.Module):
    """A cache by shape, of the first batch that had it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.cache: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        shift = self.cache.setdefault(x.shape, x.mean())
        return self.linear(x - shift)  # type: ignore[no-any-return]


class Fits(Line):
    """The task itself fits a scale, or fills a dictionary, at the first batch; or has the model built beforehand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.scale, self.kept, self.model = kind, 0.0, dict[str, float](), ActNorm()

    def build_model(self) -> nn.Module:
        return self.model if self.kind == "model" else super().build_model()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, y = batch
        self.scale = self.scale or float(x.std())
        kept = self.kept.setdefault("scale", float(x.std()))
        scale = {"attribute": self.scale, "dictionary": kept, "model": 1.0}[self.kind]
        return super().loss(model, (x / scale, y))


class Near(Line):
    """Keeps the parameters near those of the call before: their distance is nought until the first step."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        total, weight = super().loss(model, batch)
        now = [p.detach().clone() for p in model.parameters()]
        before, self.before = getattr(self, "before", now), now
        return total + sum((p - b).square().sum() for p, b in zip(model.parameters(), before, strict=True)), weight


FITTED: dict[str, Callable[[Any], Task]] = {
    "module": lambda _: Line(build_model=ActNorm),
    "by shape": lambda _: Line(build_model=KeptByShape),
    "attribute": lambda _: Fits("attribute"),
    "dictionary": lambda _: Fits("dictionary"),
    "parameters": lambda _: Near(),
    "constructor": lambda spec: make_task(Fits, spec),
}


@pytest.mark.parametrize("kind", FITTED)
def test_what_fits_itself_to_the_first_batch_is_named(make_spec: Any, kind: str) -> None:
    spec = make_spec(args={"kind": "model"})
    error = refused(FITTED[kind](spec), spec)
    assert isinstance(error, ImpureError)
    assert (error.details["part"], error.details["differs"]) == ("first", "the loss")
    assert "build_model()" in error.action


def test_a_model_that_is_built_with_a_generator_of_its_own_is_named(make_spec: Any) -> None:
    def build() -> nn.Module:
        model = nn.Linear(1, 1)
        nn.init.uniform_(model.weight, generator=torch.Generator().manual_seed(time.time_ns() % 2**31))
        return model

    error = refused(Line(build_model=build), make_spec())
    assert isinstance(error, ImpureError)
    assert (error.details["part"], error.details["differs"]) == ("model", "weight")


MADE = nn.Linear(1, 1)


class MadeBefore(Line):
    def build_model(self) -> nn.Module:
        return MADE


class Once(Line):
    built = False

    def build_model(self) -> nn.Module:
        assert not Once.built, "only once"
        Once.built = True
        return nn.Linear(1, 1)


def test_where_there_is_no_second_model_the_check_is_skipped(make_spec: Any, monkeypatch: Any) -> None:
    def found(task: Task, **train: Any) -> str:
        return checks(task, make_spec(train=train))["purity"].detail.rpartition("; ")[2]

    assert found(MadeBefore()).endswith("build_model() returned parameters that it has returned before")
    assert "only once" in found(Once())
    assert found(Line(), global_batch=30, microbatch=30, max_steps=1).startswith("there is no other")
    assert found(Line()) == "the same after another one"
    monkeypatch.setattr("psworker.trainer.preflight.purity.available_bytes", lambda _: 1)
    assert found(Line()).endswith("too much memory")


def test_state_that_may_change_something_later_is_a_warning(make_spec: Any) -> None:
    class Scheduled(Line):
        calls = 0

        def loss(self, model: nn.Module, batch: Any) -> Any:
            self.calls += 1
            total, weight = super().loss(model, batch)
            return total * (1.0 if self.calls < 100 else 0.5), weight

    table = checks(Scheduled(), make_spec())
    assert (table["state"].ok, table["state"].warning) == (True, True)
    assert table["state"].detail.startswith("task.calls changed") and "(1, then 3)" in table["state"].detail
    assert "state" not in checks(Line(), make_spec())
