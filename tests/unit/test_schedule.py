"""Learning rates: those of torch's schedulers where torch has one, else the literal formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from pscluster.job.optimizer import OptimizerSection, ScheduleName, ScheduleSection
from pscluster.job.schedule import learning_rate, momentum

BASE, STEPS = 0.3, 40
Make = Callable[[torch.optim.Optimizer], Any]
TORCHS: dict[str, tuple[dict[str, Any], Make]] = {
    "linear": (
        {"name": "linear", "final_ratio": 0.25},
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=STEPS),
    ),
    "polynomial": (
        {"name": "polynomial", "power": 2.0},
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=2.0),
    ),
    "exponential": ({"name": "exponential", "gamma": 0.9}, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "step": ({"name": "step", "period_steps": 7, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
    "multistep": ({"name": "multistep", "milestones": [3, 20]}, lambda o: lr_scheduler.MultiStepLR(o, [3, 20], 0.1)),
    "restarts": (
        {"name": "cosine_restarts", "period_steps": 5, "period_factor": 2, "final_ratio": 0.1},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=0.1 * BASE),
    ),
    "onecycle": (
        {"name": "onecycle", "rise": 0.25},
        lambda o: lr_scheduler.OneCycleLR(o, BASE, total_steps=STEPS, pct_start=0.25),
    ),
}


def torchs(make: Make) -> tuple[list[float], list[float]]:
    """Rates and momenta of every step by a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=BASE, momentum=0.9)
    scheduler, rates, momenta = make(optimizer), [], []
    for step in range(STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        momenta.append(float(optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        if step + 1 < STEPS:
            scheduler.step()
    return rates, momenta


def rates(schedule: ScheduleSection, steps: int = STEPS) -> list[float]:
    return [learning_rate(BASE, schedule, step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", TORCHS)
def test_a_schedule_is_torchs(name: str) -> None:
    section, make = TORCHS[name]
    assert rates(ScheduleSection(**section)) == pytest.approx(torchs(make)[0], rel=1e-9, abs=1e-15)


def test_one_cycle_moves_the_momentum_against_the_rate_as_torch_does() -> None:
    section, make = TORCHS["onecycle"]
    schedule = ScheduleSection(**section)
    sgd = OptimizerSection(name="sgd", momentum=0.9)
    found = [momentum(sgd, schedule, step, STEPS) for step in range(STEPS)]
    assert found == pytest.approx(torchs(make)[1], rel=1e-9)
    assert momentum(OptimizerSection(), schedule, 0, STEPS) == 0.95, "Adam's beta1"
    assert OptimizerSection().with_momentum(0.95).betas == (0.95, 0.999)
    assert momentum(OptimizerSection(name="adagrad"), schedule, 0, STEPS) is None
    assert momentum(sgd, ScheduleSection(name="cosine"), 0, STEPS) is None


def test_inverse_sqrt_is_vaswanis() -> None:
    warmup = 10
    expected = [min(n**-0.5, n * warmup**-1.5) for n in range(1, STEPS + 1)]
    found = rates(ScheduleSection(name="inverse_sqrt", warmup_steps=warmup))
    assert found == pytest.approx([BASE * one * math.sqrt(warmup) for one in expected], rel=1e-12)


def test_wsd_is_flat_and_then_falls() -> None:
    found = rates(ScheduleSection(name="wsd", warmup_steps=5, decay_steps=10, final_ratio=0.1))
    assert found[4:31] == [BASE] * 27
    assert found[30:] == sorted(found[30:], reverse=True)
    assert learning_rate(BASE, ScheduleSection(name="wsd", final_ratio=0.1), STEPS, STEPS) == pytest.approx(0.1 * BASE)


@given(st.sampled_from(get_args(ScheduleName)), st.integers(0, 50), st.integers(0, 200), st.integers(1, 60))
def test_defaults_alone_give_a_rate_within_bounds(name: Any, warmup: int, step: int, final: int) -> None:
    schedule = ScheduleSection(name=name) if name == "onecycle" else ScheduleSection(name=name, warmup_steps=warmup)
    assert 0.0 <= learning_rate(BASE, schedule, step, final) <= BASE


@pytest.mark.parametrize("name", [name for name in get_args(ScheduleName) if name != "constant"])
def test_defaults_alone_change_the_rate(name: Any) -> None:
    assert len(set(rates(ScheduleSection(name=name)))) > 1
