"""How fast a trainer computes, made of what it measures itself: smooth under noise, quick when something changed. Pure.

Volatile: a restarted master learns it again from the next beats.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

SMOOTHING = 0.1  # weight of a new measurement once there are a few
APART = 0.2  # a measurement that differs by more than this may be a change rather than noise ...
NUM_APART = 3  # ... and is, when so many in a row differ to the same side
FORGET_S = 10.0  # after so long without a measurement the next one begins afresh
FORGET_MICROBATCHES = 5  # but not before so many microbatches could have been computed


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSpeed:
    """`microbatch_s`: seconds that one microbatch takes, waiting left out; 0 before the first measurement.

    `microbatches`: how many the trainer had measured by then. `measurements`: of which this is made, since it began
    afresh. `apart`: the newest ones, while they differ to one side. `heard_s`: monotonic time of the newest one."""

    microbatch_s: float = 0.0
    microbatches: int = 0
    measurements: int = 0
    apart: tuple[float, ...] = ()
    heard_s: float = -math.inf

    @property
    def is_known(self) -> bool:
        return self.measurements > 0


UNKNOWN = MeasuredSpeed()


def heard(pace: MeasuredSpeed, microbatch_s: float, microbatches: int, now_s: float) -> MeasuredSpeed:
    """The pace after a measurement. One that is none (no positive number), or that was heard before, changes nothing.

    `microbatches` below the known count: the same process never says that, so it is taken as heard before."""
    if not (math.isfinite(microbatch_s) and microbatch_s > 0) or microbatches <= pace.microbatches:
        return pace
    fresh = replace(pace, microbatches=microbatches, heard_s=now_s)
    silence_s = now_s - pace.heard_s
    if not pace.is_known or silence_s > max(FORGET_S, FORGET_MICROBATCHES * pace.microbatch_s):
        return replace(fresh, microbatch_s=microbatch_s, measurements=1, apart=())
    apart = _apart(pace, microbatch_s)
    if len(apart) >= NUM_APART:
        return replace(fresh, microbatch_s=statistics.median(apart), measurements=len(apart), apart=())
    weight = max(SMOOTHING, 1 / (pace.measurements + 1))
    smooth_s = pace.microbatch_s + weight * (microbatch_s - pace.microbatch_s)
    return replace(fresh, microbatch_s=smooth_s, measurements=pace.measurements + 1, apart=apart)


def _apart(pace: MeasuredSpeed, microbatch_s: float) -> tuple[float, ...]:
    """The measurements in a row, this one the last, that are far from the pace, all on its side."""
    ratio = microbatch_s / pace.microbatch_s
    if 1 / (1 + APART) <= ratio <= 1 + APART:
        return ()
    is_slower = ratio > 1
    same_side = tuple(s for s in pace.apart if (s > pace.microbatch_s) == is_slower)
    return (*(same_side if len(same_side) == len(pace.apart) else ()), microbatch_s)
