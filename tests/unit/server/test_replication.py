"""A connection from a primary to its standby breaks, also within a send: nothing is lost, and nobody waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.offered_job import FINAL_STEP, OfferedJob, same
from harness.played import PlayedConnection
from pscluster.wire.frame import FrameKind

SENDS = 8  # of one step at most: the roots of five buckets and of the summary, the decision, and one more


def line_of(job: OfferedJob, handler: object) -> PlayedConnection:
    """The end of the one connection that this handler has."""
    (found,) = [connection for connection in job.network.connections if connection.handler is handler]
    return found


def to_its_standby(job: OfferedJob, index: int) -> PlayedConnection:
    return line_of(job, job.partition(index).replication._dialer)


def versions(job: OfferedJob) -> list[int]:
    return [job.partition(index).version for index in range(job.count)]


@pytest.fixture(scope="module")
def undisturbed() -> list[torch.Tensor]:
    return OfferedJob(1, standbys=False).run_to_the_end()


def goes_on_as_if_nothing_had_been(job: OfferedJob, undisturbed: list[torch.Tensor]) -> None:
    values = job.run_to_the_end()
    assert same(values, undisturbed)
    assert (job.network.breaks, job.master.restores) == (1, 1)
    assert all(job.master.standbys), "a healthy standby was given up"
    job.close()


@pytest.mark.parametrize("takes", range(SENDS))
@pytest.mark.parametrize("index", [0, 1])
def test_a_standby_in_sync_gets_the_sums_that_did_not_reach_it(
    index: int, takes: int, undisturbed: list[torch.Tensor]
) -> None:
    """Its partition finds the line broken at any of the sends of a step, with more to be sent after it."""
    job = OfferedJob(2)
    job.make_steps(2)
    assert job.master.synced == [True, True]
    to_its_standby(job, index).takes = takes
    for each in range(2):
        job.push(each)
    job.network.settle()
    job.network.settle()
    assert versions(job) == [3, 3], "it was over again, and nobody but the two was asked"
    goes_on_as_if_nothing_had_been(job, undisturbed)


@pytest.mark.parametrize("takes", range(SENDS))
def test_a_partition_outlives_a_standby_that_is_not_in_sync(takes: int, undisturbed: list[torch.Tensor]) -> None:
    """Votes do not wait for it: while its sums are sent, the step must not be decided on by the way."""
    job = OfferedJob(1)
    job.everybody_adopts()
    partition = job.partition(0)
    while not partition.replication._streams:
        job.network.choices()[0]()
    line = to_its_standby(job, 0)
    line.reading, line.takes = False, takes  # that it holds the state is not heard
    job.network.settle(redial=False)
    assert not partition.replication.in_sync.ack_required
    for _ in range(2):
        job.push(0)
        job.network.settle(redial=False)
    assert partition.version == 2
    goes_on_as_if_nothing_had_been(job, undisturbed)


def _ends(job: OfferedJob, number: int) -> list[PlayedConnection]:
    """Both ends of the number-th connection, once it is there."""
    for _ in range(1000):
        if len(job.network.connections) > 2 * number:
            return job.network.connections[2 * number :][:2]
        job.network.choices()[0]()
    raise AssertionError("it was never made")


@pytest.mark.parametrize("end", ["who dialled", "who was dialled"])
@pytest.mark.parametrize("number", range(3))
def test_a_line_may_break_within_any_send(number: int, end: str, undisturbed: list[torch.Tensor]) -> None:
    """Of two partitions' lines to their standbys and the one that votes go over, from the first frame to the last."""
    takes, struck = 0, True
    while struck:
        job = OfferedJob(2)
        job.everybody_adopts()
        broken = _ends(job, number)[end == "who was dialled"]
        broken.takes = takes
        values = job.run_to_the_end()
        struck = job.network.breaks > 0
        assert same(values, undisturbed), takes
        assert job.master.restores == 1 and all(job.master.standbys)
        job.close()
        takes += 1
    assert takes > FINAL_STEP, "it broke once in each step at least"


def _resumed(job: OfferedJob) -> list[FrameKind]:
    """The coordinator's line is dialled again; what is on its way to the standby when the coordinator has heard its
    welcome."""
    job.network.fire_timers()
    for _ in range(1000):
        if job.partition(0).replication._streams:
            other = to_its_standby(job, 0).other
            assert other is not None
            return [header.kind for header, *_ in other.inbox]
        job.network.choices()[0]()
    raise AssertionError("it never came back")


@pytest.mark.parametrize("moment", ["before it", "within it"])
def test_an_evaluation_finalised_while_the_line_was_down_is_told_over_the_next(moment: str) -> None:
    """After a step more the standby takes over: it is reported again, and counts in what is best."""
    job = OfferedJob(2)
    job.make_steps(2)
    coordinator = job.partition(0)
    if moment == "before it":
        to_its_standby(job, 0).close(None)
    else:
        to_its_standby(job, 0).takes = 0
    job.evaluate()
    assert coordinator.metadata.evaluated == 2
    assert _resumed(job) == [FrameKind.METADATA]
    job.make_steps(1)
    job.lose_partition(0)
    job.everybody_adopts()
    job.settle()
    after: Any = job.partition(0)
    assert [(e.step, dict(e.metrics)) for e in after.link.reported("evaluated")] == [(2, {"loss": 2.0})]
    assert (after.version, after.coordinator.evaluated, job.master.restores) == (3, 2, 1)
    job.close()


def test_it_is_told_after_the_decision_that_made_its_version_and_before_the_sums_of_the_next_step() -> None:
    """What a standby notes is of the version that it has; and no step is voted on before it knows of the evaluation."""
    job = OfferedJob(2)
    job.make_steps(2)
    coordinator, standby = job.partition(0), job.standby(0)
    assert coordinator.step is not None and standby is not None
    num_sums = len(coordinator.step.trained) + len(coordinator.step.averaged) + len(coordinator.step.carried) + 1
    to_its_standby(job, 0).takes = num_sums  # and breaks at the decision
    for index in range(2):
        job.push(index)
    job.network.settle(redial=False)
    assert (coordinator.version, standby.version, job.network.breaks) == (3, 2, 1)
    job.evaluate()
    for index in range(2):
        job.push(index)
    assert _resumed(job) == [FrameKind.DECISION, FrameKind.METADATA] + [FrameKind.PUSH] * num_sums
    job.settle()
    assert (coordinator.version, standby.version) == (4, 4)
    assert standby.metadata.evaluated == 3
    job.close()
