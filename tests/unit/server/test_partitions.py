"""Real partitions of one job on a network that breaks: the same values at the end, whatever was lost on the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.offered_job import FINAL_STEP, Events, OfferedJob, events_of, play, same
from harness.played import PlayedLink
from harness.played_job import AVERAGED, TRAINED


def made(count: int, transport: str = "tcp") -> OfferedJob:
    return OfferedJob(count, transport=transport, standbys=False)


@pytest.fixture(scope="module")
def undisturbed() -> list[torch.Tensor]:
    return made(1).run_to_the_end()


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_any_number_of_partitions_ends_with_the_same_values(
    count: int, transport: str, undisturbed: list[torch.Tensor]
) -> None:
    job = made(count, transport)
    assert same(job.run_to_the_end(), undisturbed)
    assert {connection.is_local for connection in job.network.connections} == {transport == "shm"}


@settings(max_examples=250)
@given(
    count=st.integers(2, 3), transport=st.sampled_from(["tcp", "shm"]), events=events_of("partition lost", max_size=40)
)
def test_faults_change_nothing_in_the_end(
    count: int, transport: str, events: Events, undisturbed: list[torch.Tensor]
) -> None:
    """Connections break, generations change, partitions are lost; plans and frames come when they come."""
    job = made(count, transport)
    for event in events:
        play(job, *event)
        job.check()

    assert same(job.run_to_the_end(), undisturbed)
    job.close()


def begun(count: int = 2) -> OfferedJob:
    """A job whose first step is open everywhere."""
    job = made(count)
    job.everybody_adopts()
    job.network.settle()
    return job


def test_a_vote_that_is_lost_is_said_again(undisturbed: list[torch.Tensor]) -> None:
    job = begun()
    job.push(0)
    job.push(1)
    assert job.partitions[1].member.vote is not None
    job.cut(0)  # the vote was on its way

    assert same(job.run_to_the_end(), undisturbed)


@pytest.mark.parametrize(
    "between", ["nothing", "a plan for all", "a plan for the coordinator", "a plan for the member"]
)
def test_a_decision_that_is_lost_is_said_again(between: str, undisturbed: list[torch.Tensor]) -> None:
    """The coordinator went on; the other partition never heard. A new generation may come in between, to one side
    first."""
    job = begun()
    job.push(0)
    job.push(1)
    while job.partitions[0].member.step == 0:
        job.network.choices()[0]()
    assert job.partitions[1].member.step == 0
    job.cut(0)
    if between != "nothing":
        job.publish()
        first = 1 if between == "a plan for the member" else 0
        job.adopt(first)
        job.network.settle()
        if between == "a plan for all":
            job.adopt(1)
            job.network.settle()
    job.network.settle()
    if between in ("nothing", "a plan for all"):
        assert job.partitions[1].version == 1, "it hears of it when it is back, without another plan"

    assert same(job.run_to_the_end(), undisturbed)


@pytest.mark.parametrize("first", [0, 1])
def test_votes_are_cast_again_under_a_new_generation(first: int, undisturbed: list[torch.Tensor]) -> None:
    """Whichever side hears of the plan first, nothing but the plan itself is needed to go on."""
    job = begun()
    job.push(1)
    job.network.settle()
    job.publish()
    for index in (first, 1 - first):
        job.adopt(index)
        job.network.settle()
    job.push(0)
    job.network.settle()
    assert [p.version for p in job.partitions] == [1, 1]

    assert same(job.run_to_the_end(), undisturbed)


def test_a_restore_in_the_middle_of_an_update_begins_afresh(undisturbed: list[torch.Tensor]) -> None:
    job = begun()
    job.push(0)
    job.push(1)
    while job.partitions[0].machine.decision is None:
        job.network.choices()[0]()
    versions = job.partitions[0].machine.versions
    assert (versions[TRAINED], versions[AVERAGED]) == (1, 0)
    job.crash(1)
    job.adopt(0)
    assert (job.partitions[0].version, job.partitions[0].member.step) == (0, 0)

    assert same(job.run_to_the_end(), undisturbed)


def test_a_member_of_the_past_is_not_heard(undisturbed: list[torch.Tensor]) -> None:
    """The coordinator has gone back; a partition that has not heard of it keeps knocking, and is sent away."""
    job = begun(3)
    job.crash(2)
    job.adopt(0)
    for _ in range(3):
        job.network.settle()
    coordinator = job.partitions[0].coordinator
    assert coordinator is not None and coordinator.joined == {0}
    assert job.partitions[0].counters.fenced > 0

    assert same(job.run_to_the_end(), undisturbed)


def test_the_coordinator_reports_each_step_once(undisturbed: list[torch.Tensor]) -> None:
    job = made(2)
    assert same(job.run_to_the_end(), undisturbed)
    coordinator = job.partition(0)
    assert isinstance(coordinator.link, PlayedLink)
    assert coordinator.coordinator is not None
    coordinator.carry_out(coordinator.coordinator.report_progress(1e9, force=True))

    records = [record for progress in coordinator.link.reported("progress") for record in progress.records]

    assert [record.step for record in records] == list(range(1, FINAL_STEP + 1))
    assert [record.loss for record in records] == [(2.0 + step) / 2.0 for step in range(FINAL_STEP)]
