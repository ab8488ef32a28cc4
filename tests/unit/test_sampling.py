"""Every sample of an epoch is dealt once, by arithmetic alone."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.step.sampling import Permutation, ShardSampler, epoch_permutation, eval_batches

SIZES = st.integers(1, 700)
SHARDS = st.integers(1, 9)
MICROBATCHES = st.integers(1, 17)
GOLDEN_ORDER = [4, 8, 9, 6, 3, 0, 1, 7, 2, 5]


@given(n=st.integers(1, 3000), key=st.binary(min_size=48, max_size=48))
def test_a_permutation_is_a_bijection(n: int, key: bytes) -> None:
    permutation = Permutation(n, key)

    assert sorted(permutation[i] for i in range(n)) == list(range(n))


@given(n=st.integers(1, 2**40), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_a_huge_permutation_keeps_indices_apart_and_in_range(n: int, seed: int, data: st.DataObject) -> None:
    permutation = epoch_permutation(n, seed, 0)
    indices = data.draw(st.sets(st.integers(0, n - 1), max_size=50))

    images = [permutation[index] for index in indices]

    assert len(set(images)) == len(indices)
    assert all(0 <= image < n for image in images)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_permutation_has_no_place_outside_its_range(index: int) -> None:
    with pytest.raises(IndexError, match=r"range\(5\)"):
        epoch_permutation(5, 0, 0)[index]


def test_orders_differ_between_epochs_and_seeds_and_are_the_same_for_ever() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        permutation = epoch_permutation(10, seed, epoch)
        return [permutation[i] for i in range(10)]

    # Written down once: another order would make a resumed job read other data.
    assert order(1, 0) == GOLDEN_ORDER
    assert order(1, 1) != order(1, 0) != order(2, 0)


def test_each_value_comes_first_about_equally_often() -> None:
    firsts = Counter(epoch_permutation(8, seed, 0)[0] for seed in range(4000))

    chi_squared = sum((firsts[value] - 500) ** 2 / 500 for value in range(8))
    assert chi_squared < 24.3  # 0.1 % of honest permutations exceed it; the seeds are fixed


def test_neighbours_do_not_stay_neighbours() -> None:
    permutation = epoch_permutation(10_000, 3, 0)

    close = sum(abs(permutation[i] - permutation[i + 1]) < 100 for i in range(9_999))

    assert close < 300  # about 199 are expected of a random order


@given(n=SIZES, shards=SHARDS, microbatch=MICROBATCHES, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 3))
def test_an_epoch_deals_every_sample_once(n: int, shards: int, microbatch: int, seed: int, epoch: int) -> None:
    sampler = ShardSampler(n, shards, microbatch, seed)
    first = epoch * sampler.steps_per_epoch

    dealt = [
        sampler.indices(step, shard)
        for step in range(first, first + sampler.steps_per_epoch)
        for shard in range(shards)
    ]

    assert sorted(index for indices in dealt for index in indices) == list(range(n))
    # Only at the end of the epoch are shards short.
    lengths = [len(indices) for indices in dealt]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) <= microbatch


@given(n=SIZES, shards=SHARDS, microbatch=MICROBATCHES, step=st.integers(0, 500), data=st.data())
def test_a_shards_samples_do_not_depend_on_what_was_asked_before(
    n: int, shards: int, microbatch: int, step: int, data: st.DataObject
) -> None:
    shard = data.draw(st.integers(0, shards - 1))
    used = ShardSampler(n, shards, microbatch, 7)
    for other in data.draw(st.lists(st.integers(0, 500), max_size=5)):
        used.indices(other, 0)

    assert used.indices(step, shard) == ShardSampler(n, shards, microbatch, 7).indices(step, shard)


@pytest.mark.parametrize(("max_steps", "epochs", "final"), [(7, None, 7), (None, 2, 26), (7, 2, 7), (100, 2, 26)])
def test_training_ends_at_the_first_limit(max_steps: int | None, epochs: int | None, final: int) -> None:
    assert ShardSampler(100, 4, 2, 0).final_step(max_steps, epochs) == final


def test_a_sampler_without_limit_or_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needed"):
        ShardSampler(100, 4, 2, 0).final_step(None, None)
    with pytest.raises(ValueError, match="above 0"):
        ShardSampler(0, 4, 2, 0)
    with pytest.raises(IndexError, match="no shard 4"):
        ShardSampler(100, 4, 2, 0).indices(0, 4)


def test_a_trillion_samples_need_no_memory() -> None:
    tracemalloc.start()
    try:
        ShardSampler(10**12, 64, 32, 5).indices(123_456_789, 63)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 100_000


@given(n=SIZES, shards=SHARDS, microbatch=MICROBATCHES)
def test_evaluation_deals_every_sample_once(n: int, shards: int, microbatch: int) -> None:
    batches = [list(eval_batches(n, shards, microbatch, shard)) for shard in range(shards)]

    assert sorted(i for of_shard in batches for batch in of_shard for i in batch) == list(range(n))
    for shard, of_shard in enumerate(batches):
        assert all(batch.start // microbatch % shards == shard for batch in of_shard)


# ---- drop_last ----


@given(n=SIZES, shards=SHARDS, microbatch=MICROBATCHES, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 3))
def test_drop_last_leaves_out_what_does_not_fill_a_microbatch(
    n: int, shards: int, microbatch: int, seed: int, epoch: int
) -> None:
    if n < microbatch:
        with pytest.raises(ValueError, match="do not fill"):
            ShardSampler(n, shards, microbatch, seed, drop_last=True)
        return
    sampler = ShardSampler(n, shards, microbatch, seed, drop_last=True)
    first = epoch * sampler.steps_per_epoch

    dealt = [
        sampler.indices(step, shard)
        for step in range(first, first + sampler.steps_per_epoch)
        for shard in range(shards)
    ]

    assert {len(indices) for indices in dealt} <= {microbatch, 0}
    used = [index for indices in dealt for index in indices]
    order = epoch_permutation(n, seed, epoch)
    assert used == [order[i] for i in range(n - n % microbatch)]
    assert sampler.left_out == n - len(used) == n % microbatch


def test_without_drop_last_nothing_is_left_out_and_the_order_is_the_same() -> None:
    kept, dropped = ShardSampler(33, 4, 8, 5), ShardSampler(33, 4, 8, 5, drop_last=True)
    assert [kept.indices(0, shard) for shard in range(4)] == [dropped.indices(0, shard) for shard in range(4)]
    assert (kept.left_out, kept.steps_per_epoch) == (0, 2)
    assert (dropped.left_out, dropped.steps_per_epoch) == (1, 1)


@given(n=SIZES, shards=SHARDS, microbatch=MICROBATCHES, steps=st.integers(1, 200), drop=st.booleans())
def test_the_smallest_microbatch_is_the_smallest_of_the_job(
    n: int, shards: int, microbatch: int, steps: int, drop: bool
) -> None:
    sampler = ShardSampler(n, shards, microbatch, 1, drop_last=drop and n >= microbatch)
    sizes = [len(sampler.indices(step, shard)) for step in range(steps) for shard in range(shards)]
    step, shard = sampler.smallest(steps)
    assert step < steps
    assert len(sampler.indices(step, shard)) == min(size for size in sizes if size)
