"""Batches, seeds and fingerprints are functions of their arguments."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from pscluster.errors import DataError, TaskError
from pscluster.step.sampling import ShardSampler
from pscluster.task import Task
from psworker.trainer.data.batches import Batches, EvalBatches, data_fingerprint, preserved_generators, seed_step


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


class Noisy:
    """Samples with augmentation: each adds a draw of the global generator to its index."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(())


def batches_of(dataset: Any, num_shards: int = 2, microbatch: int = 3) -> Batches:
    return Batches(dataset, Task().collate, ShardSampler(len(dataset), num_shards, microbatch, 5), 5)


def test_the_same_step_and_shard_give_the_same_numbers_everywhere() -> None:
    seed_step(1, 2, 3)
    first = draws()
    seed_step(1, 2, 3)

    assert draws() == first


@pytest.mark.parametrize("other", [(2, 2, 3), (1, 3, 3), (1, 2, 4)])
def test_another_seed_step_or_shard_gives_other_numbers(other: tuple[int, int, int]) -> None:
    seed_step(1, 2, 3)
    first = draws()
    seed_step(*other)

    assert not set(draws()) & set(first)


def test_a_microbatch_is_the_same_whatever_came_before() -> None:
    torch.manual_seed(0)
    one, count = batches_of(Noisy()).microbatch(1, 0)
    used = batches_of(Noisy())
    used.microbatch(0, 0)

    again, _ = used.microbatch(1, 0)

    assert one is not None
    assert again is not None
    assert count == 3
    assert torch.equal(one, again)


def test_the_forward_pass_draws_the_same_whatever_the_data_drew() -> None:
    batches_of(Noisy()).microbatch(1, 0)
    after_noise = draws()
    batches_of(list(range(10))).microbatch(1, 0)
    after_nothing = draws()
    seed_step(5, 1, 0)

    assert after_noise == after_nothing == draws()


def test_data_and_forward_pass_draw_other_numbers() -> None:
    batch, _ = batches_of(Noisy()).microbatch(1, 0)
    assert batch is not None

    assert float(torch.rand(())) not in (batch % 1).tolist()


def test_a_shard_without_samples_has_no_batch() -> None:
    # 10 samples, 6 a step: the second step has 4, so its second shard has one.
    batches = batches_of(Noisy())

    assert [batches.microbatch(1, shard)[1] for shard in (0, 1)] == [3, 1]
    assert batches_of([1, 2]).microbatch(0, 1) == (None, 0)


def test_a_sample_that_raises_is_the_users_error() -> None:
    class Torn(Noisy):
        def __getitem__(self, index: int) -> torch.Tensor:
            raise OSError(5, "Input/output error", "shard.bin")

    with pytest.raises(DataError, match=r"train_data raised OSError.*shard\.bin"):
        batches_of(Torn()).microbatch(0, 0)
    with pytest.raises(TaskError, match="collate raised TypeError"):
        batches_of([object(), object(), object()]).microbatch(0, 0)


def test_eval_batches_cover_the_data_in_order() -> None:
    batches = EvalBatches(list(range(10)), Task().collate, 2, 3, 5)

    found = [[(batch.tolist(), count) for batch, count in batches.of_shard(shard)] for shard in (0, 1)]

    assert found == [[([0, 1, 2], 3), ([6, 7, 8], 3)], [([3, 4, 5], 3), ([9], 1)]]


def test_generators_are_put_back_even_after_an_error() -> None:
    seed_step(7, 7, 7)
    expected = draws()
    seed_step(7, 7, 7)

    with pytest.raises(ZeroDivisionError), preserved_generators():
        1 / (len(draws()) - 3)

    assert draws() == expected


SAMPLES: list[Any] = [
    (torch.arange(3), {"label": 1, "text": "a"}),
    (torch.arange(3), {"label": 1, "text": "b"}),
    (torch.arange(3), {"label": 2, "text": "a"}),
    (torch.arange(3.0), {"label": 1, "text": "a"}),
    (torch.arange(3)[None], {"label": 1, "text": "a"}),
    (np.arange(3), {"label": 1, "text": "a"}),
    (b"abc", None, 1.5),
    (b"ab", "c", 1.5),
    [True, 2**70],
]


def test_fingerprints_tell_contents_types_and_lengths_apart() -> None:
    prints = [data_fingerprint([sample], None) for sample in SAMPLES]
    prints += [data_fingerprint([1, 1], None), data_fingerprint([1], None), data_fingerprint([1], [1])]

    assert len(set(prints)) == len(prints)
    assert prints[0] == data_fingerprint([SAMPLES[0]], None)


def test_a_fingerprint_never_looks_into_what_it_does_not_know() -> None:
    class Odd:
        def __reduce__(self) -> Any:
            raise AssertionError("pickled")

    assert data_fingerprint([Odd()], None) == data_fingerprint([Odd()], None)


def test_augmented_data_have_one_fingerprint_and_the_generators_stay() -> None:
    seed_step(1, 1, 1)
    before = torch.get_rng_state()

    first = data_fingerprint(Noisy(), Noisy())

    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert data_fingerprint(Noisy(), Noisy()) == first
