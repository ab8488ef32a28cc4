"""Processes that are lost before they are ready: tried elsewhere, after waits; and those that had worked, at once."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest

from psmaster.model.job import ErrorInfo, Instant, Job, JobState
from psmaster.model.plan import Placement, ProcessKind
from psmaster.model.process import Exit, Process
from psmaster.scheduling import process_losses
from tests.harness.master_world import PARTITION, TRAINER, World

FULL = ErrorInfo(code="PS-4002", cause="cannot create /state/jobs/p1: No space left on device")


class Site(World):
    """A job of one trainer and one partition, and servers to spare."""

    def start(self, workers: int = 1, servers: int = 2, **changes: Any) -> None:
        self.cluster(workers, servers)
        self.submit(servers={"partitions": 1}, workers={"min": 1, "max": 1}, **changes)

    def train_on(self) -> None:
        self.ready()
        self.snapshot(0)
        self.commit(1, 2, 3)

    def placement(self, kind: ProcessKind = ProcessKind.PARTITION) -> Placement:
        placement = self.job().placement(kind, 0)
        assert placement is not None
        return placement

    def not_started(self, name: str = "partition-0") -> None:
        self.exit(name, exit_code=127, error=FULL)

    def starts_within(self, seconds: float, name: str = "partition-0") -> float:
        """How long it takes until there is a process for that placement, which must not be longer than this."""
        waited_s = 0.0
        while name not in self.wanted():
            assert waited_s <= seconds
            self.wait(0.5)
            waited_s += 0.5
        return waited_s


@pytest.fixture
def site() -> Site:
    return Site()


def test_the_waits() -> None:
    assert [process_losses.retry_delay_s(count) for count in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_what_had_worked_is_replaced_at_once_and_where_it_was(site: Site) -> None:
    site.start()
    site.train_on()
    site.exit("partition-0", signal=9)
    assert site.wanted()["partition-0"].process_id == "job-aaaaaa/partition-0/2"
    assert site.placement().node_id == "server-0"


def test_a_sick_server_is_left_for_one_that_is_well(site: Site) -> None:
    site.start()
    site.train_on()
    site.exit("partition-0", signal=9)
    site.not_started()
    assert (site.placement().node_id, site.placement().attempt) == ("server-1", 3)
    assert "partition-0" not in site.wanted(), "it waits a moment"
    assert re.search("partition-0 on server-1, attempt 3, .* 1 s", site.job().reason)
    assert site.starts_within(1.0) == 1.0
    assert "partition-0 on server-1, attempt 3" in site.job().reason
    site.report("partition-0", PARTITION)
    site.commit(4)
    assert site.job().state is JobState.RUNNING
    assert (site.placement().losses, site.placement().failed_on, site.placement().not_before_s) == (0, (), 0.0)


def test_every_server_is_tried_before_one_is_tried_again(site: Site) -> None:
    site.start(servers=3)
    places = []
    for _ in range(5):
        site.starts_within(8.0)
        places.append(site.placement().node_id)
        site.not_started()
    assert sorted(places[:3]) == ["server-0", "server-1", "server-2"]
    assert all(here != there for here, there in pairwise(places)), places


@pytest.mark.parametrize("kind", list(ProcessKind))
def test_a_fault_of_some_seconds_on_the_only_node_fails_nothing(site: Site, kind: ProcessKind) -> None:
    """Before the first plan: of a trainer, and of a partition."""
    site.start(servers=1)
    name = f"{kind}-0"
    waits = []
    for _ in range(5):
        site.not_started(name)
        waits.append(site.starts_within(8.0, name))
    assert waits == [0.5, 1, 2, 4, 8]
    site.train_on()
    assert site.job().state is JobState.RUNNING


def test_a_fault_that_stays_fails_the_job_in_the_end_with_its_reason(site: Site) -> None:
    site.start(servers=1)
    begun_s = site.now.mono_s
    while site.job().state is JobState.STARTING:
        site.starts_within(8.0)
        site.not_started()
    assert site.job().state is JobState.FAILED
    assert site.job().error is not None
    assert "No space left on device; partition-0 was lost 6 times" in site.job().reason
    assert site.now.mono_s - begun_s == 15.5


def test_one_that_was_ready_before_the_first_plan_is_replaced_at_once(site: Site) -> None:
    site.start(servers=1)
    site.report("trainer-0", TRAINER)
    site.exit("trainer-0", signal=9)
    assert site.wanted()["trainer-0"].process_id == "job-aaaaaa/trainer-0/2"


def test_no_other_job_takes_the_place_meanwhile(site: Site) -> None:
    site.start(servers=1)
    site.submit("job-bbbbbb", servers={"partitions": 1}, workers={"min": 1, "max": 1})
    site.not_started("trainer-0")
    site.wait(0.25)
    assert site.job("job-bbbbbb").state is JobState.QUEUED
    assert site.placement(ProcessKind.TRAINER).node_id == "worker-0"


def test_the_wait_goes_on_elsewhere_when_the_node_of_the_next_one_is_lost(site: Site) -> None:
    site.start(servers=3)
    for _ in range(3):
        site.starts_within(2.0)
        site.not_started()
    node_id = site.placement().node_id
    site.join(node_id, life="2")
    assert "partition-0" not in site.wanted()
    assert site.placement().losses == 3, "that was none of its own"
    assert site.starts_within(2.0) == 2.0


def test_a_standby_is_tried_elsewhere_after_a_wait_too(site: Site) -> None:
    site.start(servers=3, durability={"tier": "replica"})
    site.report("trainer-0", TRAINER)
    site.report("partition-0", PARTITION)
    sick = site.wanted()["standby-0"].placement.node_id
    site.not_started("standby-0")
    standby = site.job().standby(0)
    assert standby is not None and standby.placed
    assert standby.node_id not in (sick, site.placement().node_id)
    assert "standby-0" not in site.wanted()
    site.wait(0.5)
    assert site.wanted()["standby-0"].placement.attempt == standby.attempt


def test_a_standby_that_takes_over_does_not_wait(site: Site) -> None:
    site.start(servers=2, durability={"tier": "replica"})
    standby = site.wanted()["standby-0"]
    site.not_started("partition-0")
    assert site.wanted()["partition-0"].process_id == standby.process_id


def test_a_new_master_keeps_the_wait_on_the_same_clock_and_forgets_it_on_another(site: Site) -> None:
    site.start(servers=1)
    site.not_started()
    site.restart()
    site.rejoin("server-0")
    assert "partition-0" not in site.wanted()
    site.wait(0.5)
    site.not_started()
    site.now = Instant(mono_s=3.0, unix_s=site.now.unix_s)  # its machine was started anew
    site.restart()
    site.rejoin("server-0")
    assert "partition-0" in site.wanted()
    assert site.placement().losses == 2, "the count is kept"


def test_an_end_that_a_hello_tells_is_no_different(site: Site) -> None:
    site.start(servers=1)
    process = site.wanted()["partition-0"]
    gone = Exit(signal=9)
    site.rejoin("server-0", Process(process_id=process.process_id, node_id="server-0", partition=PARTITION, exit=gone))
    assert site.wanted()["partition-0"].placement.attempt == 2, "it had been ready"


def test_an_ended_job_waits_for_nothing(site: Site) -> None:
    site.start(servers=1)
    site.not_started()
    site.take(lambda tx: tx.stop("job"))
    job: Job = site.job()
    assert (job.state, job.placements) == (JobState.STOPPED, ())
