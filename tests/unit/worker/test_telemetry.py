"""How long microbatches take, waiting left out, and the speed that a trainer reports from that."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from harness.clock import Clock
from psworker.trainer.telemetry import NUM_REMEMBERED, ComputeTimer, Speedometer, TrainerCounters


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock) -> ComputeTimer:
    return ComputeTimer(clock)


def take(timer: ComputeTimer, clock: Clock, seconds: float, kind: str = "train") -> None:
    with timer.computing(kind):
        clock.now_s += seconds


def test_the_median_of_its_kind_is_typical(timer: ComputeTimer, clock: Clock) -> None:
    assert timer.now() == (0.0, 0.0)
    for seconds in (1.0, 2.0, 30.0):
        take(timer, clock, seconds)
    take(timer, clock, 7.0, "evaluate")
    with timer.computing("train"):
        clock.now_s += 4.0
        assert timer.now() == (4.0, 2.0)
    assert timer.now() == (0.0, 0.0)
    assert (timer._median("train"), timer._median("evaluate")) == (3.0, 7.0)


def test_waiting_for_others_is_not_computing(timer: ComputeTimer, clock: Clock) -> None:
    with timer.computing("train"):
        clock.now_s += 1.0
        with timer.waiting():
            clock.now_s += 50.0
            assert timer.now() == (0.0, 0.0)
        clock.now_s += 1.0
        assert timer.now() == (2.0, 0.0)
    assert timer._median("train") == 2.0


def test_what_was_broken_off_is_not_remembered(timer: ComputeTimer, clock: Clock) -> None:
    def broken() -> None:
        with timer.computing("train"):
            clock.now_s += 9.0
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert timer._median("train") == 0.0
    assert timer.now() == (0.0, 0.0)


def test_only_the_latest_count(timer: ComputeTimer, clock: Clock) -> None:
    for _ in range(NUM_REMEMBERED):
        take(timer, clock, 1.0)
    for _ in range(NUM_REMEMBERED):
        take(timer, clock, 5.0)
    assert timer._median("train") == 5.0


# ---- speed ----


class Clocked:
    """A speedometer on a clock of its own."""

    def __init__(self) -> None:
        self.meter = Speedometer()
        self.now_s = 100.0

    def compute(self, seconds: Iterable[float], version: int = 0) -> None:
        """Microbatches that take so long each, besides which a second passes."""
        for each in seconds:
            self.now_s += 1.0 + each
            self.meter.take(version, each, self.now_s)

    @property
    def found_s(self) -> float:
        return self.meter.microbatch_s(self.now_s)


def test_nothing_is_known_before_the_second_microbatch() -> None:
    clocked = Clocked()
    clocked.compute([9.0])
    assert (clocked.found_s, clocked.meter.num_measured) == (0.0, 0)
    clocked.compute([1.0])
    assert (clocked.found_s, clocked.meter.num_measured) == (1.0, 1)


def test_one_outlier_does_not_matter() -> None:
    clocked = Clocked()
    clocked.compute([5.0, 0.5, 0.5, 7.0, 0.5, 0.5])
    assert clocked.found_s == 0.5


def test_a_change_shows_after_three_long_microbatches() -> None:
    clocked = Clocked()
    clocked.compute([1.0] * 10)
    clocked.compute([2.0] * 3)
    assert clocked.found_s == 2.0


def test_short_microbatches_are_taken_by_time() -> None:
    meter = Speedometer()
    for number in range(40):
        meter.take(0, 0.01 if number < 20 else 0.03, number * 0.1)
    assert meter.microbatch_s(3.9) == 0.03


def test_what_was_measured_before_standing_by_is_forgotten() -> None:
    clocked = Clocked()
    clocked.compute([4.0] * 10, version=7)
    clocked.compute([1.0], version=8)
    assert clocked.found_s == 4.0
    clocked.compute([1.0], version=30)
    assert clocked.found_s == 1.0
    clocked.compute([2.0], version=4)
    assert clocked.found_s == 2.0, "the job went back"


def test_the_counters_report_it_with_the_heartbeat() -> None:
    counters = TrainerCounters()
    assert counters.speed() is None
    for version in (3, 3):
        with counters.timer.computing("train"):
            pass
        counters.measure(version)
    speed = counters.speed()
    assert speed is not None
    assert speed.microbatches == 1
    assert 0 < speed.microbatch_s < 1
