"""A trainer's pace: smooth under noise, quick after a change."""

from __future__ import annotations

import math
import random

import pytest

from psmaster.model.speed import MeasuredSpeed, heard


def after(*measured_s: float, pace: MeasuredSpeed | None = None, every_s: float = 1.0) -> MeasuredSpeed:
    """The pace after these measurements, one each second."""
    pace = pace or MeasuredSpeed(heard_s=0.0)
    for microbatch_s in measured_s:
        pace = heard(pace, microbatch_s, pace.microbatches + 3, pace.heard_s + every_s)
    return pace


def test_nothing_is_known_before_the_first() -> None:
    assert not MeasuredSpeed().is_known
    assert after(0.5) == MeasuredSpeed(microbatch_s=0.5, microbatches=3, measurements=1, heard_s=1.0)


@pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_changes_nothing(nonsense: float) -> None:
    known = after(0.5)
    assert heard(known, nonsense, 99, 5.0) == known


def test_what_was_heard_before_changes_nothing() -> None:
    known = after(0.5, 0.5)
    assert heard(known, 0.9, known.microbatches, 9.0) == known


def test_the_first_few_count_alike() -> None:
    assert after(0.9, 1.0, 1.1).microbatch_s == pytest.approx(1.0)


def test_noise_is_smoothed() -> None:
    noise = random.Random(1)
    pace = after(*(1 + noise.uniform(-0.15, 0.15) for _ in range(50)))
    seen = []
    for _ in range(500):
        pace = after(1 + noise.uniform(-0.15, 0.15), pace=pace)
        seen.append(pace.microbatch_s)
    assert all(0.9 < pace_s < 1.1 for pace_s in seen)


@pytest.mark.parametrize("change", [2.0, 0.5, 1.4])
def test_a_change_is_believed_after_three_measurements(change: float) -> None:
    pace = after(*[1.0] * 20, *[change] * 3)
    assert pace.microbatch_s == pytest.approx(change)


def test_one_outlier_is_not_a_change() -> None:
    pace = after(*[1.0] * 20, 2.0, 1.0, 2.0, 0.4, 2.0)
    assert pace.microbatch_s < 1.5
    assert after(*[1.0] * 20, pace=pace).microbatch_s == pytest.approx(1.0, abs=0.05)


def test_after_a_long_silence_it_begins_afresh() -> None:
    slow = after(*[5.0] * 9)
    assert after(1.0, pace=slow, every_s=20.0).microbatch_s < 5.0, "five microbatches may take that long"
    fresh = after(1.0, pace=slow, every_s=26.0)
    assert (fresh.microbatch_s, fresh.measurements) == (1.0, 1)
