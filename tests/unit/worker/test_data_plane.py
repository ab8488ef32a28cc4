"""Real exchanges against real partitions: whatever bytes travel by, and whatever breaks, the same bits come out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.trained_job import FINAL_STEP, TrainedJob
from pscluster.wire.frame import FrameKind

Outcome = tuple[str, dict[int, float]]
CODECS: list[dict[str, Any]] = [
    {"push_codec": push, "pull_codec": pull} for push, pull in itertools.product(("fp32", "bf16"), repeat=2)
]
IDS = [f"push {c['push_codec']}, pull {c['pull_codec']}" for c in CODECS]


def outcome(job: TrainedJob) -> Outcome:
    found = job.run_to_the_end()
    assert job.taken_lanes() == 0, "every place in shared memory was given back"
    job.close()
    return found


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Outcome]:
    """What one trainer and one partition come to over TCP, by codecs."""
    found = {name: outcome(TrainedJob(**codecs)) for name, codecs in zip(IDS, CODECS, strict=True)}
    assert len({digest for digest, _ in found.values()}) == len(CODECS), "each codec rounds something"
    assert all(set(evaluated) == {2, FINAL_STEP} for _, evaluated in found.values())
    return found


@pytest.mark.parametrize(("name", "codecs"), list(zip(IDS, CODECS, strict=True)), ids=IDS)
@pytest.mark.parametrize("partitions", [1, 2, 3])
@pytest.mark.parametrize(
    "transports", [("tcp",), ("unix",), ("shm",), ("shm", "shm"), ("tcp", "shm", "shm")], ids=" ".join
)
def test_any_number_of_either_by_any_way_ends_with_the_same_values(
    transports: tuple[str, ...], partitions: int, name: str, codecs: dict[str, Any], undisturbed: dict[str, Outcome]
) -> None:
    job = TrainedJob(partitions, transports, **codecs)
    found = outcome(job)

    assert found == undisturbed[name]
    shared = "shm" in transports
    assert (job.network.in_memory[FrameKind.PUSH] > 0) is shared
    assert (job.network.in_memory[FrameKind.VALUES] > 0) is shared


FAULTS = ("cut", "cut", "cut and redial", "break", "plan", "plan for all", "crash", "lose trainer")


def walk(job: TrainedJob, rng: random.Random, length: int) -> None:
    """Things happen in any order: frames arrive, trainers compute, processes hear of the newest plan."""
    for _ in range(length):
        choices = job.network.choices()
        if choices and rng.random() < 0.7:
            rng.choice(choices)()
        elif rng.random() < 0.9:
            job.turn(rng.randrange(8))
        else:
            job.adopt(rng.randrange(8))
        if not choices:
            job.network.fire_timers()


def strike(job: TrainedJob, fault: str, number: int) -> None:
    if fault.startswith("cut"):
        job.cut(number)
        if fault == "cut and redial":
            job.network.fire_timers()
    elif fault == "break":
        job.network.break_soon(number)
    elif fault.startswith("plan"):
        job.assign(turned_by=number)
        job.publish()
        if fault == "plan for all":
            job.everybody_adopts()
    elif fault == "lose trainer":
        job.lose_trainer(number)
    elif fault == "crash":
        job.crash(number % job.count)
    else:
        job.take_over(number % job.count)


@settings(max_examples=100)
@given(
    partitions=st.integers(1, 2),
    transports=st.sampled_from([("shm", "shm"), ("shm", "tcp"), ("tcp", "tcp"), ("shm", "shm", "unix")]),
    codec=st.sampled_from(range(len(CODECS))),
    seed=st.integers(0, 2**32),
    faults=st.lists(st.tuples(st.integers(0, 150), st.sampled_from(FAULTS), st.integers(0, 99)), max_size=8),
)
def test_faults_change_nothing_in_the_end(
    partitions: int,
    transports: tuple[str, ...],
    codec: int,
    seed: int,
    faults: list[tuple[int, str, int]],
    undisturbed: dict[str, Outcome],
) -> None:
    """Connections break, shards are dealt anew, trainers and partitions are lost, at any moment."""
    job = TrainedJob(partitions, transports, **CODECS[codec])
    job.everybody_adopts()
    rng = random.Random(seed)
    for length, fault, number in faults:
        walk(job, rng, length)
        job.check()
        strike(job, fault, number)

    assert outcome(job) == undisturbed[IDS[codec]]


@pytest.mark.parametrize("fault", sorted(set(FAULTS)))
@pytest.mark.parametrize("codec", [0, 3], ids=[IDS[0], IDS[3]])
def test_a_fault_at_any_point_of_a_job_changes_nothing(codec: int, fault: str, undisturbed: dict[str, Outcome]) -> None:
    """The same course of events each time, struck a little later each time."""
    struck: set[int] = set()
    breaks = 0
    for length in range(20, 620, 30):
        job = TrainedJob(2, ("shm", "shm"), **CODECS[codec])
        job.everybody_adopts()
        walk(job, random.Random(7), length)
        struck.add(job.partitions[0].version)
        strike(job, fault, length)
        assert outcome(job) == undisturbed[IDS[codec]], f"after {length} events"
        breaks += job.network.breaks
    assert struck == set(range(FINAL_STEP + 1)), "from the first step to the last"
    assert (breaks >= 5) is (fault == "break"), breaks


@settings(max_examples=100)
@given(
    partitions=st.integers(1, 2),
    transports=st.sampled_from([("shm", "shm"), ("shm", "tcp"), ("tcp", "tcp")]),
    codec=st.sampled_from(range(len(CODECS))),
    seed=st.integers(0, 2**32),
    faults=st.lists(
        st.tuples(st.integers(0, 150), st.sampled_from(("take over", *FAULTS)), st.integers(0, 99)), max_size=8
    ),
)
def test_faults_of_a_job_with_standbys_change_nothing_in_the_end(
    partitions: int,
    transports: tuple[str, ...],
    codec: int,
    seed: int,
    faults: list[tuple[int, str, int]],
    undisturbed: dict[str, Outcome],
) -> None:
    job = TrainedJob(partitions, transports, standbys=True, **CODECS[codec])
    job.everybody_adopts()
    rng = random.Random(seed)
    for length, fault, number in faults:
        walk(job, rng, length)
        job.check()
        strike(job, fault, number)

    assert outcome(job) == undisturbed[IDS[codec]]


@pytest.mark.parametrize("codec", [0, 3], ids=[IDS[0], IDS[3]])
@pytest.mark.parametrize("partition", [0, 1])
def test_a_standby_takes_over_at_any_point_and_nobody_goes_back(
    codec: int, partition: int, undisturbed: dict[str, Outcome]
) -> None:
    """The same course of events each time, struck a little later each time; evaluations and the end among them."""
    struck: set[int] = set()
    for length in range(60, 900, 30):
        job = TrainedJob(2, ("shm", "shm"), standbys=True, **CODECS[codec])
        job.everybody_adopts()
        walk(job, random.Random(7), length)
        job.take_over(partition)
        if job.master.takeovers:
            struck.add(job.partitions[partition].version)
        assert outcome(job) == undisturbed[IDS[codec]], f"after {length} events"
        assert job.master.restores == 1
    assert struck >= set(range(FINAL_STEP)), "from the first step to the last"


def test_gradients_from_before_a_restore_give_back_their_lanes(undisturbed: dict[str, Outcome]) -> None:
    """The trainer is in the middle of a step while the partition is replaced and shares its memory; then it pushes what
    it has of before the restore."""
    job = TrainedJob(1, ("shm",), **CODECS[0])
    job.everybody_adopts()
    (trainer,) = job.trainers.values()
    while not any(counter._held for counter in trainer._sums.values()):
        job.network.settle()
        trainer.turn()
    job.crash(0)
    job.everybody_adopts()
    job.network.settle()
    assert job.taken_lanes() == 0
    trainer.turn()
    assert job.taken_lanes() > 0, "before anybody knows that nobody wants them"
    job.network.settle()
    assert job.taken_lanes() == 0

    assert outcome(job) == undisturbed[IDS[0]]
