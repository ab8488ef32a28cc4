"""A trainer's speed: smooth under noise, quick after a change."""

from __future__ import annotations

import math
import random

import pytest

from psmaster.model.process import MeasuredSpeed, with_measurement


def after(*measured_s: float, speed: MeasuredSpeed | None = None, every_s: float = 1.0) -> MeasuredSpeed:
    """The speed after these measurements, one each second."""
    speed = speed or MeasuredSpeed(measured_at_s=0.0)
    for microbatch_s in measured_s:
        speed = with_measurement(speed, microbatch_s, speed.microbatches + 3, speed.measured_at_s + every_s)
    return speed


def test_nothing_is_known_before_the_first() -> None:
    assert not MeasuredSpeed().is_known
    assert after(0.5) == MeasuredSpeed(microbatch_s=0.5, microbatches=3, measurements=1, measured_at_s=1.0)


@pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_changes_nothing(nonsense: float) -> None:
    known = after(0.5)
    assert with_measurement(known, nonsense, 99, 5.0) == known


def test_a_repeated_measurement_changes_nothing() -> None:
    known = after(0.5, 0.5)
    assert with_measurement(known, 0.9, known.microbatches, 9.0) == known


def test_the_first_few_count_alike() -> None:
    assert after(0.9, 1.0, 1.1).microbatch_s == pytest.approx(1.0)


def test_noise_is_smoothed() -> None:
    noise = random.Random(1)
    speed = after(*(1 + noise.uniform(-0.15, 0.15) for _ in range(50)))
    seen = []
    for _ in range(500):
        speed = after(1 + noise.uniform(-0.15, 0.15), speed=speed)
        seen.append(speed.microbatch_s)
    assert all(0.9 < pace_s < 1.1 for pace_s in seen)


@pytest.mark.parametrize("change", [2.0, 0.5, 1.4])
def test_a_change_is_believed_after_three_measurements(change: float) -> None:
    speed = after(*[1.0] * 20, *[change] * 3)
    assert speed.microbatch_s == pytest.approx(change)


def test_one_outlier_is_not_a_change() -> None:
    speed = after(*[1.0] * 20, 2.0, 1.0, 2.0, 0.4, 2.0)
    assert speed.microbatch_s < 1.5
    assert after(*[1.0] * 20, speed=speed).microbatch_s == pytest.approx(1.0, abs=0.05)


def test_after_a_long_silence_it_begins_afresh() -> None:
    slow = after(*[5.0] * 9)
    assert after(1.0, speed=slow, every_s=20.0).microbatch_s < 5.0, "five microbatches may take that long"
    fresh = after(1.0, speed=slow, every_s=26.0)
    assert (fresh.microbatch_s, fresh.measurements) == (1.0, 1)
