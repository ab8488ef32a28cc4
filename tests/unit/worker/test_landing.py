"""Which values may land: once everything is there, it is all of the wanted version, and exact if that was wanted."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pscluster.step.layout import BLOCK_WORDS, Layout, TensorSpec
from psworker.trainer.values import Landing, Place

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(2 * BLOCK_WORDS,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(3,), dtype="float32", kind="averaged"),
        TensorSpec(names=("fixed",), shape=(3,), dtype="float32", kind="frozen"),
    )
)
NUM_PARTITIONS = 2
FROZEN = 2


def places(*, frozen: bool) -> list[Place]:
    return [
        (partition, bucket.index)
        for bucket in LAYOUT.buckets
        for partition in range(NUM_PARTITIONS)
        if LAYOUT.span(bucket.index, partition, NUM_PARTITIONS).num_words and (frozen or bucket.kind != "frozen")
    ]


def landing() -> Landing:
    return Landing(LAYOUT, NUM_PARTITIONS)


def deliver(it: Landing, version: int, *, exact: bool = False, only: int | None = None) -> list[bool]:
    """Everything that partitions would send, complete; whether each landed."""
    found = []
    for place in places(frozen=it.needs_frozen):
        if only in (None, place[1]):
            found.append(it.begin(place, version, exact))
            it.finish(place, version)
    return found


def test_what_was_asked_for_lands_and_is_held() -> None:
    it = landing()
    assert it.want(3) == "missing"
    assert it.want(3) == "asked", "they need not be asked for twice"
    assert it.is_missing_from(0) and it.is_missing_from(1)
    assert all(deliver(it, 3))

    assert it.is_complete and not it.is_missing_from(0)
    assert it.want(3) == "held"


def test_a_bucket_is_there_when_all_of_its_parts_are() -> None:
    it = landing()
    it.want(3)
    (first, second) = [place for place in places(frozen=True) if place[1] == 0]
    it.begin(first, 3)
    assert not it.finish(first, 3)
    it.begin(second, 3)

    assert it.finish(second, 3) and it.has_bucket(0) and not it.has_bucket(1)


@pytest.mark.parametrize("version", [2, 4])
def test_another_version_is_dropped_and_a_newer_one_remembered(version: int) -> None:
    it = landing()
    it.want(3)

    assert not any(deliver(it, version))
    assert not it.is_complete
    assert it.is_superseded is (version == 4)


def test_values_that_nobody_asked_for_are_dropped() -> None:
    it = landing()
    assert not any(deliver(it, 0))
    it.want(3)
    deliver(it, 3)
    assert not any(deliver(it, 3)), "they are there already"


def test_what_never_changes_is_asked_for_once() -> None:
    it = landing()
    it.want(3)
    assert it.needs_frozen
    deliver(it, 3)
    it.want(4)

    assert not it.needs_frozen
    assert deliver(it, 4) == [True] * len(places(frozen=False))
    assert it.is_complete
    it.restart()
    assert it.want(0) == "missing" and not it.needs_frozen


@pytest.mark.parametrize("exact", [False, True])
def test_values_of_the_other_exactness_are_dropped(exact: bool) -> None:
    it = landing()
    it.want(3, exact=exact)
    assert not any(deliver(it, 3, exact=not exact))
    assert not it.is_complete and not it.is_superseded

    assert all(deliver(it, 3, exact=exact))
    assert it.is_complete


def test_exact_values_become_the_others_by_rounding_and_never_the_other_way_round() -> None:
    it = landing()
    it.want(3, exact=True)
    deliver(it, 3, exact=True)
    assert it.want(3, exact=False) == "round"
    assert it.is_complete and it.want(3, exact=False) == "held"

    assert it.want(3, exact=True) == "missing"
    assert not it.is_complete
    assert not any(deliver(it, 3, exact=False)), "late ones, which were on their way"
    assert all(deliver(it, 3, exact=True))


def test_half_of_the_exact_values_do_not_count_as_the_others() -> None:
    it = landing()
    it.want(3, exact=True)
    deliver(it, 3, exact=True, only=0)

    assert it.want(3, exact=False) == "missing"
    assert not it.has_bucket(0)


@pytest.mark.parametrize("exact", [False, True])
def test_one_may_go_back_to_what_is_held_until_the_newer_begins_to_land(exact: bool) -> None:
    it = landing()
    it.want(3, exact=exact)
    deliver(it, 3, exact=exact)
    it.want(4)
    assert it.want(3, exact=exact) == "held"
    it.want(4)
    assert it.want(3, exact=False) == ("round" if exact else "held")
    it.want(4)
    assert it.begin((0, 1) if (0, 1) in places(frozen=False) else (1, 1), 4)

    assert it.want(3) == "gone"
    assert it.wanted == 4


def test_once_the_newer_version_was_there_no_way_leads_back() -> None:
    """Not even when it is asked for once more, exactly: nothing of that has begun to land, and the old one is gone."""
    it = landing()
    it.want(3)
    deliver(it, 3)
    it.want(4)
    deliver(it, 4)
    assert it.want(4, exact=True) == "missing"

    assert it.want(3) == "gone"


def test_a_place_that_was_begun_and_broke_off_is_not_there() -> None:
    it = landing()
    it.want(3)
    place = places(frozen=True)[0]
    assert it.begin(place, 3)
    deliver(it, 3, only=1)
    assert not it.has_bucket(0)

    assert it.begin(place, 3), "it comes again over the next connection"
    it.finish(place, 3)
    assert not it.has_bucket(0) and it.is_missing_from(1 - place[0]), "the other part is to come"


class LandingAgainstMemory(RuleBasedStateMachine):
    """What is in memory, place by place, while anything arrives: (version, exact), or None while it is torn.

    Each partition has one connection, over which one body comes after the other, unless it breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.it = landing()
        self.memory: dict[Place, tuple[int, bool] | None] = dict.fromkeys(places(frozen=True))
        self.arriving: dict[int, tuple[Place, int, bool, bool]] = {}
        self.before: int | None = None  # the version before the wanted one, if it was all there

    @rule(ahead=st.integers(0, 2), exact=st.booleans())
    def want(self, ahead: int, exact: bool) -> None:
        version = max(0, self.it.wanted) + ahead
        if version > self.it.wanted:
            self.before = self.it.wanted if self.it.is_complete and self.it.wanted >= 0 else None
        self._wanted(self.it.want(version, exact), version, exact)

    @precondition(lambda self: self.before is not None)
    @rule(exact=st.booleans())
    def go_back(self, exact: bool) -> None:
        """Shards of the step before are dealt anew."""
        assert self.before is not None
        answer = self.it.want(self.before, exact)
        self._wanted(answer, self.before, exact)
        if answer != "gone":
            self.before = None

    def _wanted(self, answer: str, version: int, exact: bool) -> None:
        if answer == "round":
            for place in places(frozen=False):
                assert self.memory[place] == (version, True)
                self.memory[place] = (version, False)
        elif answer == "held":
            self._is_all_there(version, exact)

    @rule(place=st.sampled_from(places(frozen=True)), nearby=st.integers(-1, 1), exact=st.booleans())
    def values_begin(self, place: Place, nearby: int, exact: bool) -> None:
        if place[0] in self.arriving:
            return
        version = max(0, self.it.wanted + nearby)
        lands = self.it.begin(place, version, exact)
        self.arriving[place[0]] = (place, version, exact, lands)
        if lands:
            self.memory[place] = None

    @precondition(lambda self: self.arriving)
    @rule(data=st.data())
    def values_end(self, data: st.DataObject) -> None:
        place, version, exact, lands = self.arriving.pop(data.draw(st.sampled_from(sorted(self.arriving))))
        if lands:
            self.memory[place] = (version, exact)
        self.it.finish(place, version)

    @precondition(lambda self: self.arriving)
    @rule(data=st.data())
    def connection_breaks(self, data: st.DataObject) -> None:
        self.arriving.pop(data.draw(st.sampled_from(sorted(self.arriving))))

    @rule()
    def everything_comes(self) -> None:
        """Otherwise a version is hardly ever complete."""
        self.arriving.clear()
        for place in places(frozen=self.it.needs_frozen):
            if self.it.begin(place, self.it.wanted, self.it.exact):
                self.memory[place] = (self.it.wanted, self.it.exact)
            self.it.finish(place, self.it.wanted)

    def _is_all_there(self, version: int, exact: bool) -> None:
        for place in places(frozen=False):
            assert self.memory[place] == (version, exact), place
        assert all(self.memory[place] is not None for place in places(frozen=True))

    @invariant()
    def what_counts_as_there_is_there(self) -> None:
        if self.it.is_complete and self.it.wanted >= 0:
            self._is_all_there(self.it.wanted, self.it.exact)


TestLandingAgainstMemory = LandingAgainstMemory.TestCase
TestLandingAgainstMemory.settings = settings(max_examples=200, stateful_step_count=40)


def test_memory_that_holds_no_version_yet_is_no_way_back() -> None:
    """After a restart, whatever lies in memory is of before the restore."""
    it = Landing(LAYOUT, 1)
    it.restart()
    it.want(1)

    assert it.want(0) == "gone"
