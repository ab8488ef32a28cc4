"""Which snapshots exist."""

from __future__ import annotations

from psmaster.model import snapshot_catalog
from psmaster.model.plan import Part
from psmaster.model.snapshot_catalog import Catalogue


def part(step: int, index: int, generation: int = 1) -> Part:
    return Part(step=step, partition=index, generation=generation, path="p", size_bytes=1, checksum="c")


def of(*parts: Part, num_partitions: int = 2) -> Catalogue:
    held = Catalogue(num_partitions=num_partitions)
    for one in parts:
        held = snapshot_catalog.add(held, one)
    return held


def whole(*steps: int) -> Catalogue:
    return of(*(part(step, index) for step in steps for index in range(2)))


def test_a_snapshot_exists_once_every_part_does() -> None:
    held = of(part(10, 0))
    assert held.complete_steps() == ()
    assert held.newest() is None
    held = snapshot_catalog.add(held, part(10, 1))
    assert held.complete_steps() == (10,)
    point = held.newest()
    assert point is not None
    assert [one.partition for one in point.parts] == [0, 1]


def test_repeats_and_strangers_change_nothing() -> None:
    held = whole(10)
    assert snapshot_catalog.add(held, part(10, 1)) == held
    assert snapshot_catalog.add(held, part(10, 2)) == held


def test_a_newer_generation_replaces_and_an_older_one_does_not() -> None:
    held = of(part(10, 0, generation=3))
    assert snapshot_catalog.add(held, part(10, 0, generation=2)) == held
    newer = snapshot_catalog.add(held, part(10, 0, generation=4))
    assert newer.parts[10, 0].generation == 4


def test_the_two_newest_and_the_best_are_kept() -> None:
    held = whole(10, 20, 30, 40)
    assert snapshot_catalog.kept_steps(held, frozenset()) == (30, 40)
    assert snapshot_catalog.kept_steps(held, frozenset({10})) == (10, 30, 40)
    assert snapshot_catalog.prune(held, frozenset({10})).complete_steps() == (10, 30, 40)
    assert snapshot_catalog.kept_steps(Catalogue(num_partitions=2), frozenset({10})) == ()


def test_a_best_on_its_way_gives_up_nothing_that_is_on_its_way_before_it() -> None:
    held = of(*whole(10).parts.values(), part(20, 0))
    assert snapshot_catalog.kept_steps(held, frozenset({30})) == (10,)
    assert snapshot_catalog.kept_steps(whole(10, 40), frozenset({30})) == (10, 30, 40)


def test_pruning_spares_what_is_on_its_way() -> None:
    held = of(*whole(10, 20, 30).parts.values(), part(25, 0), part(40, 1))
    assert {step for step, _ in snapshot_catalog.prune(held, frozenset()).parts} == {20, 30, 40}
    assert {step for step, _ in snapshot_catalog.prune(held, frozenset({25})).parts} == {20, 25, 30, 40}


def test_what_partitions_may_have_deleted_is_outrun() -> None:
    held = whole(10, 40)
    assert [step for step in (5, 10, 30, 40, 50) if snapshot_catalog.is_outrun(held, step, frozenset())] == [5, 30]
    assert not snapshot_catalog.is_outrun(held, 30, frozenset({30}))
    assert not snapshot_catalog.is_outrun(Catalogue(num_partitions=2), 30, frozenset())


def test_a_restore_leaves_complete_snapshots_alone() -> None:
    held = of(*whole(10, 20).parts.values(), part(30, 0))
    assert {step for step, _ in snapshot_catalog.settle_for_restore(held).parts} == {10, 20}


def test_an_unreadable_snapshot_is_struck_out() -> None:
    assert snapshot_catalog.without(whole(10, 20), 20).complete_steps() == (10,)
