"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from pscluster.job.spec import ScheduleSection


def learning_rate(base: float, schedule: ScheduleSection, step: int, final_step: int) -> float:
    """Rate of the update that makes version `step` + 1 of `final_step`.

    Warm-up is linear and reaches `base` at update number `warmup_steps`. The cosine (Loshchilov and Hutter, 2017,
    without restarts) falls from `base` to `final_ratio * base` over the steps after it.
    """
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return base
    length = max(1, final_step - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / length)
    floor = schedule.final_ratio
    return base * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
