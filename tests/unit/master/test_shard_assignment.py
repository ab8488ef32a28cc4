"""Shard dealing: whole, contiguous, fast, and in as few subtrees as that allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.step.tree import tree_of
from psmaster.scheduling.rebalance import cover_size, least_makespan_s, makespan_s, split_shards

SPEEDS = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=12)


def equal(ranks: Iterable[int]) -> dict[int, float]:
    return dict.fromkeys(ranks, 1.0)


def sizes_of(runs: dict[int, tuple[tuple[int, int], ...]]) -> dict[int, int]:
    return {rank: sum(count for _, count in of_rank) for rank, of_rank in runs.items()}


@given(num_shards=st.integers(1, 200), num_ranks=st.integers(1, 40))
def test_shards_are_dealt_whole_contiguous_and_even(num_shards: int, num_ranks: int) -> None:
    runs = split_shards(num_shards, equal(range(num_ranks)))
    dealt = [shard for rank in range(num_ranks) for first, count in runs[rank] for shard in range(first, first + count)]
    assert dealt == list(range(num_shards))
    sizes = [sum(count for _, count in runs[rank]) for rank in range(num_ranks)]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(runs[rank]) <= 1 for rank in range(num_ranks))


@pytest.mark.parametrize("num_shards", range(1, 13))
@pytest.mark.parametrize("num_ranks", range(1, 6))
def test_an_even_assignment_is_as_aligned_as_it_can_be(num_shards: int, num_ranks: int) -> None:
    small, num_large = divmod(num_shards, num_ranks)

    def cost(large: frozenset[int]) -> int:
        sizes = [small + (rank in large) for rank in range(num_ranks)]
        firsts = [0, *itertools.accumulate(sizes)]
        return sum(cover_size(num_shards, first, size) for first, size in zip(firsts, sizes, strict=False))

    best = min(cost(frozenset(large)) for large in itertools.combinations(range(num_ranks), num_large))
    dealt = split_shards(num_shards, equal(range(num_ranks)))
    runs = [run for rank_runs in dealt.values() for run in rank_runs]
    assert sum(cover_size(num_shards, first, count) for first, count in runs) == best


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(1, n))))
def test_cover_size_counts_the_trees_own_nodes(shape: tuple[int, int, int]) -> None:
    num_leaves, first, count = shape
    count = min(count, num_leaves - first)
    assert cover_size(num_leaves, first, count) == len(tree_of(num_leaves).cover(range(first, first + count)))


def test_an_assignment_depends_on_the_ranks_order_alone() -> None:
    assert split_shards(8, equal([5, 2])) == {2: ((0, 4),), 5: ((4, 4),)}
    assert split_shards(8, {}) == {}


def test_a_power_of_two_is_dealt_in_whole_subtrees() -> None:
    for rank, ((first, count),) in split_shards(16, equal(range(4))).items():
        assert (first, count) == (4 * rank, 4)
        assert cover_size(16, first, count) == 1


# ---- by speed ----


@given(num_shards=st.integers(1, 100), speeds=SPEEDS)
def test_shards_are_dealt_whole_and_contiguous_at_any_speeds(num_shards: int, speeds: list[float]) -> None:
    runs = split_shards(num_shards, dict(enumerate(speeds)))
    dealt = [shard for rank in sorted(runs) for first, count in runs[rank] for shard in range(first, first + count)]
    assert dealt == list(range(num_shards))
    assert all(len(of_rank) <= 1 for of_rank in runs.values())


@given(num_shards=st.integers(1, 100), speeds=SPEEDS)
def test_no_deal_is_done_earlier(num_shards: int, speeds: list[float]) -> None:
    by_rank = dict(enumerate(speeds))
    least_s = least_makespan_s(num_shards, speeds)
    assert makespan_s(sizes_of(split_shards(num_shards, by_rank)), by_rank) == least_s
    fitting = sum(int(least_s * (1 - 1e-6) / speed) for speed in speeds)
    assert fitting < num_shards, "in less time they could not have done it"


@given(num_shards=st.integers(1, 60), num_ranks=st.integers(1, 12), speed=st.floats(0.001, 1000.0))
def test_equal_speeds_are_equal_whatever_they_are(num_shards: int, num_ranks: int, speed: float) -> None:
    ranks = range(num_ranks)
    assert split_shards(num_shards, dict.fromkeys(ranks, speed)) == split_shards(num_shards, equal(ranks))


@pytest.mark.parametrize("num_shards", range(1, 9))
@pytest.mark.parametrize("speeds", [(1.0, 2.0), (1.0, 1.0, 3.0), (2.0, 1.0, 1.5), (1.0, 9.0), (5.0, 1.0, 1.0, 2.5)])
def test_the_least_time_is_that_of_all_possible_deals(num_shards: int, speeds: tuple[float, ...]) -> None:
    def slowest(sizes: tuple[int, ...]) -> float:
        return max(size * speed for size, speed in zip(sizes, speeds, strict=True))

    deals = itertools.product(range(num_shards + 1), repeat=len(speeds))
    assert least_makespan_s(num_shards, speeds) == min(slowest(d) for d in deals if sum(d) == num_shards)


def test_half_the_speed_is_half_the_shards() -> None:
    assert split_shards(12, {0: 1.0, 1: 2.0}) == {0: ((0, 8),), 1: ((8, 4),)}
    assert split_shards(12, {0: 2.0, 1: 1.0}) == {0: ((0, 4),), 1: ((4, 8),)}


def test_who_is_too_slow_for_one_shard_gets_none() -> None:
    assert split_shards(4, {0: 1.0, 1: 9.0, 2: 1.0}) == {0: ((0, 2),), 1: (), 2: ((2, 2),)}


@given(num_shards=st.integers(2, 60), speeds=st.lists(st.floats(0.01, 10.0), min_size=2, max_size=8), data=st.data())
def test_one_rank_may_get_just_one(num_shards: int, speeds: list[float], data: st.DataObject) -> None:
    by_rank = dict(enumerate(speeds))
    single = data.draw(st.sampled_from(sorted(by_rank)))
    runs = split_shards(num_shards, by_rank, single=single)
    sizes = sizes_of(runs)
    assert sizes[single] == 1
    others = {rank: speed for rank, speed in by_rank.items() if rank != single}
    assert makespan_s({rank: sizes[rank] for rank in others}, others) == least_makespan_s(
        num_shards - 1, list(others.values())
    )
    dealt = [shard for rank in sorted(runs) for first, count in runs[rank] for shard in range(first, first + count)]
    assert dealt == list(range(num_shards))


def test_who_is_alone_has_all_of_them_even_when_it_should_get_one() -> None:
    assert split_shards(5, {3: 7.0}, single=3) == {3: ((0, 5),)}
