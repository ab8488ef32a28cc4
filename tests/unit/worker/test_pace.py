"""The time that a trainer computes at a microbatch, on a clock of the test's."""

from __future__ import annotations

import pytest

from psworker.trainer.pace import NUM_REMEMBERED, ComputeTimer


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> ComputeTimer:
    return ComputeTimer(clock)


def take(pace: ComputeTimer, clock: Clock, seconds: float, kind: str = "train") -> None:
    with pace.computing(kind):
        clock.now_s += seconds


def test_the_median_of_its_kind_is_typical(pace: ComputeTimer, clock: Clock) -> None:
    assert pace.now() == (0.0, 0.0)
    for seconds in (1.0, 2.0, 30.0):
        take(pace, clock, seconds)
    take(pace, clock, 7.0, "evaluate")
    with pace.computing("train"):
        clock.now_s += 4.0
        assert pace.now() == (4.0, 2.0)
    assert pace.now() == (0.0, 0.0)
    assert (pace.typical_s("train"), pace.typical_s("evaluate")) == (3.0, 7.0)


def test_waiting_for_others_is_not_computing(pace: ComputeTimer, clock: Clock) -> None:
    with pace.computing("train"):
        clock.now_s += 1.0
        with pace.waiting():
            clock.now_s += 50.0
            assert pace.now() == (0.0, 0.0)
        clock.now_s += 1.0
        assert pace.now() == (2.0, 0.0)
    assert pace.typical_s("train") == 2.0


def test_what_was_broken_off_is_not_remembered(pace: ComputeTimer, clock: Clock) -> None:
    def broken() -> None:
        with pace.computing("train"):
            clock.now_s += 9.0
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert pace.typical_s("train") == 0.0
    assert pace.now() == (0.0, 0.0)


def test_only_the_latest_count(pace: ComputeTimer, clock: Clock) -> None:
    for _ in range(NUM_REMEMBERED):
        take(pace, clock, 1.0)
    for _ in range(NUM_REMEMBERED):
        take(pace, clock, 5.0)
    assert pace.typical_s("train") == 5.0
