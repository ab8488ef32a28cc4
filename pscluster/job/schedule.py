"""The learning rate of each step: a pure function of the step, in closed form.

`t` counts the steps after the warm-up, of which there are `length`. The rates are those of torch.optim.lr_scheduler but
for the last bits of a double, since those multiply from step to step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping

from pscluster.job.optimizer import OptimizerSection, ScheduleSection

_Curve = Callable[[ScheduleSection, int, int], float]


def learning_rate(base: float, schedule: ScheduleSection, step: int, final_step: int) -> float:
    """Rate of the update that makes version `step` + 1 of `final_step`.

    Warm-up is linear and reaches `base` at update number `warmup_steps`; then the curve begins."""
    if schedule.name == "onecycle":
        return base * _one_cycle_rate(schedule, step, final_step)
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    length = max(1, final_step - schedule.warmup_steps)
    return base * _CURVES[schedule.name](schedule, step - schedule.warmup_steps, length)


def momentum(optimizer: OptimizerSection, schedule: ScheduleSection, step: int, final_step: int) -> float | None:
    """The momentum (beta1 of Adam's kin) that `onecycle` sets for a step, against the learning rate; None: the
    optimizer's own, which has none to be set, or the schedule leaves it."""
    if schedule.name != "onecycle" or not (optimizer.momentum or "betas" in optimizer.own_keys):
        return None
    low, high = schedule.momentum_range
    rising, share = _one_cycle_phase(schedule, step, final_step)
    return _annealed(high, low, share) if rising else _annealed(low, high, share)


def _constant(_schedule: ScheduleSection, _t: int, _length: int) -> float:
    return 1.0


def _linear(schedule: ScheduleSection, t: int, length: int) -> float:
    return _falling(schedule, 1.0 - min(1.0, t / length))


def _cosine(schedule: ScheduleSection, t: int, length: int) -> float:
    """Loshchilov and Hutter, 2017, without restarts."""
    return _falling(schedule, 0.5 * (1.0 + math.cos(math.pi * min(1.0, t / length))))


def _cosine_restarts(schedule: ScheduleSection, t: int, length: int) -> float:
    """SGDR (Loshchilov and Hutter, 2017): periods of `period_steps` (default: a quarter of the length), each longer
    than the one before it by `period_factor`."""
    period = schedule.period_steps or max(1, math.ceil(length / 4))
    while t >= period:
        t -= period
        period *= schedule.period_factor
    return _falling(schedule, 0.5 * (1.0 + math.cos(math.pi * t / period)))


def _polynomial(schedule: ScheduleSection, t: int, length: int) -> float:
    return _falling(schedule, (1.0 - min(1.0, t / length)) ** schedule.power)


def _exponential(schedule: ScheduleSection, t: int, length: int) -> float:
    """gamma ** t; by default a hundredth is left at the end."""
    return schedule.gamma**t if schedule.gamma is not None else float(0.01 ** (t / length))


def _step(schedule: ScheduleSection, t: int, length: int) -> float:
    """Times gamma (default 0.1) every `period_steps` (default: a third of the length)."""
    return float(_gamma(schedule) ** (t // (schedule.period_steps or max(1, math.ceil(length / 3)))))


def _multistep(schedule: ScheduleSection, t: int, length: int) -> float:
    """Times gamma (default 0.1) at each milestone, a number of steps; by default at half and three quarters."""
    step = t + schedule.warmup_steps
    halfway, late = (schedule.warmup_steps + math.ceil(length * share) for share in (0.5, 0.75))
    return float(_gamma(schedule) ** bisect.bisect_right(schedule.milestones or (halfway, late), step))


def _inverse_sqrt(schedule: ScheduleSection, t: int, _length: int) -> float:
    """sqrt(w / n) for update number n, w = max(1, warmup_steps): Vaswani et al., 2017, scaled to reach 1."""
    warmup = max(1, schedule.warmup_steps)
    return math.sqrt(warmup / max(warmup, t + schedule.warmup_steps + 1))


def _wsd(schedule: ScheduleSection, t: int, length: int) -> float:
    """Warm-up, stable, decay (Hu et al., 2024): linear over the last `decay_steps`, by default a tenth of all steps."""
    decay = min(length, schedule.decay_steps or max(1, math.ceil((length + schedule.warmup_steps) / 10)))
    return _falling(schedule, min(1.0, max(0, length - t) / decay))


def _one_cycle_rate(schedule: ScheduleSection, step: int, final_step: int) -> float:
    """Super-convergence (Smith and Topin, 2018) as torch's OneCycleLR with cosines has it, `max_lr` being the rate."""
    first = 1.0 / schedule.div_factor
    rising, share = _one_cycle_phase(schedule, step, final_step)
    return _annealed(first, 1.0, share) if rising else _annealed(1.0, first / schedule.final_div_factor, share)


def _one_cycle_phase(schedule: ScheduleSection, step: int, final_step: int) -> tuple[bool, float]:
    """Whether the rate rises at a step, and how much of the rise or fall is done."""
    top, end = schedule.rise * final_step - 1, max(1, final_step - 1)
    if step <= top:
        return True, step / top if top > 0 else 1.0
    return False, min(1.0, (step - max(top, 0.0)) / (end - max(top, 0.0))) if end > top else 1.0


def _annealed(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * share))


def _falling(schedule: ScheduleSection, share: float) -> float:
    """From 1 (share 1) to `final_ratio` (share 0)."""
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * share


def _gamma(schedule: ScheduleSection) -> float:
    return schedule.gamma if schedule.gamma is not None else 0.1


_CURVES: Mapping[str, _Curve] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_restarts": _cosine_restarts,
    "polynomial": _polynomial,
    "exponential": _exponential,
    "step": _step,
    "multistep": _multistep,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
}
