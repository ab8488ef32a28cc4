"""Draining: everything moves away first, nothing is computed again, and who has no other place stays and says so."""

from __future__ import annotations

import re

import pytest

from pscluster.errors import NotFoundError
from psmaster.model.job import ErrorInfo, JobState, JobWarning
from psmaster.model.plan import Plan, ProcessKind
from psmaster.model.reports import Progress
from psmaster.scheduling import drain
from tests.harness.master_world import PARTITION, TRAINER, World

JOB = "job-aaaaaa"


class Site(World):
    """A world with eyes for its nodes."""

    def drain(self, node_id: str) -> None:
        self.take(lambda tx: tx.drain(node_id))

    def undrain(self, node_id: str) -> None:
        self.take(lambda tx: tx.drain(node_id, undo=True))

    def status(self, node_id: str) -> str:
        return drain.status(self.state, self.state.nodes[node_id])

    def waits(self, node_id: str) -> list[str]:
        return drain.waits_for(self.state, self.state.nodes[node_id], self.now, self.limits.suspicion_s)

    @property
    def plan(self) -> Plan:
        plan = self.job().plan
        assert plan is not None
        return plan

    def shards(self) -> dict[str, int]:
        """By node of the active trainers."""
        return {
            placement.node_id: sum(n for _, n in placement.shards)
            for placement in self.job().trainers
            if placement.active
        }

    def hold(self, step: int) -> None:
        """The coordinator reports that the job rests."""
        self.report("partition-0", Progress(generation=self.job().generation, step=step, held=True))


@pytest.fixture
def site() -> Site:
    site = Site()
    site.running()
    return site


# ---- trainers ----


def test_shards_move_first_and_the_trainer_goes_after_the_next_step(site: Site) -> None:
    process = site.wanted()["trainer-1"].process_id
    site.drain("worker-1")
    assert site.shards() == {"worker-0": 8, "worker-1": 0}
    assert site.plan.restore_generation == 1
    assert site.wanted()["trainer-1"].process_id == process, "it finishes what it is at"
    assert site.status("worker-1") == "draining"
    assert site.waits("worker-1") == [f"{JOB}: trainer-1 hands over its shards"]
    site.wait(1)
    assert "trainer-1" in site.wanted()
    site.commit(6)
    assert "trainer-1" not in site.wanted()
    assert site.status("worker-1") == "drained"
    assert site.waits("worker-1") == []
    assert "on the way" not in site.job().reason
    assert "TrainerMoved" in site.reasons()
    assert not {"TrainerLost", "RolledBack"} & set(site.reasons())


def test_its_placement_goes_to_a_node_with_room() -> None:
    site = Site()
    site.train(2, workers={"max": 2})
    site.join("worker-2")
    site.drain("worker-1")
    site.commit(6)
    assert site.wanted()["trainer-1"].placement.node_id == "worker-2"
    assert "1 more on the way" in site.job().reason
    site.ready()
    assert site.shards() == {"worker-0": 4, "worker-2": 4}


def test_with_nobody_to_take_over_another_is_started_first() -> None:
    site = Site()
    site.train(1, workers={"min": 1, "max": 1})
    site.drain("worker-0")
    assert site.shards() == {"worker-0": 8}
    assert "trainer-0" in site.waits("worker-0")[0]
    site.wait(600)
    assert site.job().state is JobState.RUNNING
    assert site.shards() == {"worker-0": 8}
    site.join("worker-1")
    assert site.wanted()["trainer-1"].placement.node_id == "worker-1"
    assert site.waits("worker-0") == [f"{JOB}: waits until trainer-1 is ready on worker-1"]
    assert site.shards() == {"worker-0": 8}, "it is not ready yet"
    site.report("trainer-1", TRAINER)
    assert site.shards() == {"worker-0": 0, "worker-1": 8}
    site.commit(6)
    assert list(site.wanted()) == ["trainer-1", "partition-0", "partition-1"], "no more trainers than workers.max"
    assert site.status("worker-0") == "drained"


def test_when_the_one_that_was_to_take_over_is_lost_nothing_is_given_up() -> None:
    site = Site()
    site.train(1, workers={"min": 1, "max": 1})
    site.drain("worker-0")
    site.join("worker-1")
    site.exit("trainer-1", signal=9)
    assert site.shards() == {"worker-0": 8}
    site.wait(0.5)
    assert site.wanted()["trainer-1"].process_id.endswith("/2"), "it is tried again"


def test_undone_before_the_other_is_ready_there_is_one_again() -> None:
    site = Site()
    site.train(1, workers={"min": 1, "max": 1})
    site.drain("worker-0")
    site.join("worker-1")
    site.undrain("worker-0")
    assert list(site.wanted()) == ["trainer-0", "partition-0", "partition-1"]
    assert site.shards() == {"worker-0": 8}


def test_a_job_that_only_starts_starts_elsewhere() -> None:
    site = Site()
    site.cluster(workers=3, servers=3)
    site.submit(workers={"min": 2, "max": 2})
    assert {placement.node_id for placement in site.job().trainers} == {"worker-0", "worker-1"}
    site.drain("worker-0")
    site.drain("server-0")
    assert {placement.node_id for placement in site.job().trainers} == {"worker-1", "worker-2"}
    assert {placement.node_id for placement in site.job().partitions} == {"server-1", "server-2"}
    site.ready()
    site.commit(1)
    assert site.job().state is JobState.RUNNING


def test_nothing_new_is_placed_there_until_it_is_undone() -> None:
    site = Site()
    site.cluster(workers=1, servers=2)
    site.drain("worker-0")
    site.submit(workers={"min": 1, "max": 1})
    assert site.job().state is JobState.QUEUED
    assert re.search("1 worker.* 0 ", site.job().reason)
    site.undrain("worker-0")
    assert site.job().state is JobState.STARTING
    assert site.status("worker-0") == ""


def test_undone_in_time_it_changes_nothing(site: Site) -> None:
    site.drain("worker-1")
    site.undrain("worker-1")
    site.wait(10)
    site.commit(6, 7)
    assert site.status("worker-1") == ""
    assert "trainer-1" in site.wanted()
    assert "TrainerMoved" not in site.reasons()


# ---- partitions ----


def test_a_partition_moves_from_the_step_at_which_the_job_rests(site: Site) -> None:
    site.join("server-2")
    other = site.wanted()["partition-0"].process_id
    site.drain("server-1")
    assert site.plan.save
    assert site.plan.restore_generation == 1
    assert site.waits("server-1") == [f"{JOB}: completes its step"]
    site.commit(6)
    site.hold(7)
    assert site.waits("server-1") == [f"{JOB}: is paused at step 7 until its snapshot is complete"]
    assert "step 7" in site.job().reason
    assert site.wanted()["partition-1"].placement.node_id == "server-1"
    site.snapshot(7)
    moved = site.wanted()["partition-1"]
    assert (moved.placement.node_id, moved.placement.attempt) == ("server-2", 2)
    assert site.status("server-1") == "drained"
    site.report("partition-1", PARTITION)
    assert (site.plan.resume_step, site.plan.save, site.job().step) == (7, False, 7)
    assert site.plan.restore_generation == site.plan.generation
    assert site.wanted()["partition-0"].process_id == other
    received = [event for event in site.events if event.reason in ("Moved", "RolledBack", "PartitionLost")]
    assert [(event.reason, event.warning) for event in received] == [("Moved", False)]
    site.commit(8)
    site.wait(60)
    assert not site.plan.save
    assert "2 workers" in site.job().reason


def test_a_snapshot_that_is_there_already_is_enough(site: Site) -> None:
    site.join("server-2")
    site.commit(*range(6, 11))
    site.snapshot(10)
    site.drain("server-0")
    site.hold(10)
    assert site.wanted()["partition-0"].placement.node_id == "server-2"
    site.report("partition-0", PARTITION)
    assert site.plan.resume_step == 10


def test_without_room_elsewhere_a_partition_stays_and_steps_go_on(site: Site) -> None:
    site.drain("server-1")
    assert not site.plan.save
    assert "partition-1" in site.waits("server-1")[0]
    site.commit(6)
    site.wait(60)
    assert site.job().state is JobState.RUNNING
    site.join("server-2")
    assert site.plan.save


def test_two_partitions_need_two_places() -> None:
    site = Site()
    site.join("worker-0")
    site.join("server-0", slots=2)
    site.submit()
    site.ready()
    site.snapshot(0)
    site.commit(1)
    site.join("server-1")
    site.drain("server-0")
    assert not site.plan.save
    site.join("server-2")
    assert site.plan.save
    site.hold(2)
    site.snapshot(2)
    assert {placement.node_id for placement in site.job().partitions} == {"server-1", "server-2"}


def test_undone_while_the_job_rests_it_goes_on(site: Site) -> None:
    site.join("server-2")
    site.drain("server-1")
    site.hold(6)
    site.undrain("server-1")
    assert not site.plan.save
    assert site.plan.restore_generation == 1
    site.snapshot(6)
    site.wait(10)
    assert site.wanted()["partition-1"].placement.node_id == "server-1"


def test_a_rest_under_an_older_plan_does_not_count(site: Site) -> None:
    site.join("server-2")
    site.drain("server-1")
    late = Progress(generation=site.job().generation, step=6, held=True)
    site.undrain("server-1")
    site.drain("server-1")
    site.report("partition-0", late)
    site.snapshot(6)
    assert site.wanted()["partition-1"].placement.node_id == "server-1"
    site.hold(8)
    site.snapshot(8)
    assert site.wanted()["partition-1"].placement.node_id == "server-2"


def test_a_snapshot_that_does_not_come_holds_nobody_for_ever(site: Site) -> None:
    site.join("server-2")
    site.drain("server-1")
    site.hold(6)
    info = ErrorInfo(code="PS-4001", cause="the disk is full")
    site.report("partition-1", JobWarning(step=6, error=info))
    site.wait(drain.SAVE_S - 1)
    assert site.plan.save
    site.wait(2)
    assert not site.plan.save, "steps go on"
    assert "PartitionStays" in site.reasons()
    site.wait(drain.RETRY_S - 5)
    assert not site.plan.save
    site.wait(10)
    assert site.plan.save, "it is tried again"
    site.hold(90)
    site.snapshot(90)
    assert site.wanted()["partition-1"].placement.node_id == "server-2"


def test_a_partition_lost_meanwhile_comes_back_elsewhere(site: Site) -> None:
    site.join("server-2")
    site.drain("server-1")
    site.exit("partition-1", signal=9)
    assert site.wanted()["partition-1"].placement.node_id == "server-2"
    assert not site.job().saving
    site.report("partition-1", PARTITION)
    assert not site.plan.save
    assert site.status("server-1") == "drained"


def test_a_job_that_stops_is_not_moved(site: Site) -> None:
    site.join("server-2")
    site.take(lambda tx: tx.stop(JOB))
    site.drain("server-1")
    site.drain("worker-1")
    assert not site.plan.save
    assert site.waits("server-1") == [f"{JOB}: is about to end"]
    site.finish(6, stopped=True)
    site.snapshot(6)
    assert site.status("server-1") == "drained"


# ---- durable, and by SIGTERM ----


def test_it_outlives_the_master(site: Site) -> None:
    site.join("server-2")
    site.drain("worker-1")
    site.drain("server-1")
    site.hold(6)
    facts = dict(site.state.processes)
    site.restart()
    assert set(site.state.drains) == {"worker-1", "server-1"}
    for node_id in site.lives:
        site.rejoin(node_id, *(process for process in facts.values() if process.node_id == node_id))
    assert site.plan.save
    site.hold(8)
    site.snapshot(8)
    assert site.wanted()["partition-1"].placement.node_id == "server-2"
    site.report("partition-1", PARTITION)
    site.commit(7)
    assert site.status("worker-1") == "drained"


def test_an_unknown_node_is_refused(site: Site) -> None:
    for ask in (site.drain, site.undrain):
        with pytest.raises(NotFoundError):
            ask("worker-9")


def test_a_drained_node_may_leave_and_comes_back_drained(site: Site) -> None:
    site.drain("worker-1")
    site.commit(6)
    site.take(lambda tx: tx.detach("worker-1", site.lives["worker-1"], for_good=True))
    site.undrain("worker-1")
    site.join("worker-1", life="2")
    assert site.status("worker-1") == ""
    site.drain("worker-1")
    site.join("worker-1", life="3")
    assert site.status("worker-1") != ""


def test_a_node_that_says_it_is_leaving_is_emptied_and_its_next_life_is_not(site: Site) -> None:
    site.take(lambda tx: tx.leaving("worker-1", site.lives["worker-1"]))
    assert site.shards() == {"worker-0": 8, "worker-1": 0}
    site.commit(6)
    assert site.status("worker-1") == "drained"
    site.take(lambda tx: tx.detach("worker-1", site.lives["worker-1"], for_good=True))
    assert "TrainerLost" not in site.reasons()
    site.join("worker-1", life="2")
    assert site.status("worker-1") == ""
    assert site.wanted()["trainer-1"].placement.node_id == "worker-1"


def test_when_all_leave_the_job_waits_and_does_not_fail(site: Site) -> None:
    for node_id in ("worker-0", "worker-1"):
        site.take(lambda tx, node_id=node_id: tx.leaving(node_id, site.lives[node_id]))
        site.take(lambda tx, node_id=node_id: tx.detach(node_id, site.lives[node_id], for_good=True))
        site.lives.pop(node_id)
    assert site.job().reason.startswith("waits for a trainer: a free worker slot for trainer-0")
    site.wait(300)
    assert site.job().state is JobState.RUNNING
    site.join("worker-5")
    site.ready()
    assert site.shards() == {"worker-5": 8}
    assert all(placement.kind is ProcessKind.TRAINER for placement in site.job().trainers)


def test_a_dead_node_is_unhealthy_until_it_is_drained(site: Site) -> None:
    def problems() -> list[str]:
        return drain.problems(site.state, site.now, site.limits.suspicion_s)

    assert problems() == []
    site.join("worker-2")
    site.wait(20, silent=frozenset({"worker-2"}))
    assert problems() == ["node worker-2 is dead"]
    site.drain("worker-2")
    assert problems() == []
    site.undrain("worker-2")
    assert problems() == ["node worker-2 is dead"]
