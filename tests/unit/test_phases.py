"""Where time goes: each second belongs to one phase, the innermost."""

from __future__ import annotations

import pytest

from harness.clock import Clock
from pscluster.agent import link
from pscluster.agent.link import Phases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(link, "time", made)
    return made


def test_every_phase_begins_at_zero_and_adds_up(clock: Clock) -> None:
    measured = Phases(("data", "push"))
    assert measured.seconds == {"data": 0.0, "push": 0.0}
    for _ in range(3):
        with measured.measure("push"):
            clock.now_s += 2
        clock.now_s += 50

    assert measured.seconds == {"data": 0.0, "push": 6.0}


def test_a_phase_within_a_phase_counts_as_the_inner_one_alone(clock: Clock) -> None:
    measured = Phases(("backward", "push", "pull"))
    with measured.measure("backward"):
        clock.now_s += 1
        with measured.measure("push"):
            clock.now_s += 10
            with measured.measure("pull"):
                clock.now_s += 100
            clock.now_s += 20
        clock.now_s += 2
        with measured.measure("push"):
            clock.now_s += 40
        clock.now_s += 4

    assert measured.seconds == {"backward": 7.0, "push": 70.0, "pull": 100.0}


def test_a_phase_within_itself_is_counted_once(clock: Clock) -> None:
    measured = Phases(("sum",))
    with measured.measure("sum"):
        clock.now_s += 1
        with measured.measure("sum"):
            clock.now_s += 2
        clock.now_s += 4

    assert measured.seconds == {"sum": 7.0}


def test_a_phase_that_fails_is_counted_and_the_next_are_right(clock: Clock) -> None:
    measured = Phases(("backward", "push"))

    def fail() -> None:
        clock.now_s += 1
        with measured.measure("push"):
            clock.now_s += 2
            raise ValueError("inner")

    with pytest.raises(ValueError, match="inner"), measured.measure("backward"):
        fail()
    with measured.measure("backward"):
        clock.now_s += 4

    assert measured.seconds == {"backward": 5.0, "push": 2.0}


@pytest.mark.usefixtures("clock")
def test_a_phase_of_no_name_is_our_own_mistake() -> None:
    measured = Phases(("data",))
    with pytest.raises(KeyError, match="pull"), measured.measure("pull"):
        pass
    with measured.measure("data"):
        pass
