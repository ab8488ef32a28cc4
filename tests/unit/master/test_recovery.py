"""What is lost, replaced, gone back to; and everything late, repeated or stale that must change nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from psmaster.api import proto
from psmaster.model.job import ErrorInfo, JobState, JobWarning
from psmaster.model.process import Exit, Process
from tests.harness.master_world import PARTITION, TRAINER, World, failure


@pytest.fixture
def world() -> World:
    world = World()
    world.running()
    return world


def plan_of(world: World) -> tuple[int, int, int]:
    plan = world.job().plan
    assert plan is not None
    return plan.generation, plan.restore_generation, plan.resume_step


def test_a_lost_trainers_shards_go_to_the_others_at_once(world: World) -> None:
    world.exit("trainer-0", signal=9)
    plan = world.job().plan
    assert plan is not None
    assert plan_of(world) == (2, 1, 0)
    assert [placement.shards for placement in plan.trainers] == [(), ((0, 8),)]
    assert world.wanted()["trainer-0"].process_id == "job-aaaaaa/trainer-0/2"
    assert world.wanted()["trainer-0"].placement.node_id == "worker-0"
    assert "was ended by signal 9 (SIGKILL)" in world.events[-2].message + world.events[-1].message
    assert "1 more on the way" in world.job().reason
    world.report("trainer-0", TRAINER)
    assert plan_of(world) == (3, 1, 0)
    assert [placement.shards for placement in world.job().trainers] == [((0, 4),), ((4, 4),)]


def test_recovery_ends_with_the_first_step_under_the_new_plan(world: World) -> None:
    world.exit("trainer-0", signal=9)
    world.wait(0.5)
    world.commit(6, generation=1)
    assert "Recovered" not in world.reasons()
    world.commit(7)
    recovered = [event for event in world.events if event.reason == "Recovered"]
    assert [event.seconds for event in recovered] == [0.5]


def test_a_suspects_shards_go_to_others_until_it_is_heard_again(world: World) -> None:
    world.suspect("trainer-0", "silent")
    assert plan_of(world) == (2, 1, 0)
    assert [placement.shards for placement in world.job().trainers] == [(), ((0, 8),)]
    assert world.wanted()["trainer-0"].process_id == "job-aaaaaa/trainer-0/1", "it lives, and may come back"
    assert world.job().reason.startswith("trains on 1 worker; ") and "trainer-0 on worker-0" in world.job().reason
    world.suspect("trainer-0", "silent")
    assert plan_of(world) == (2, 1, 0), "a repeat changes nothing"
    world.commit(6)
    assert "Recovered" in world.reasons()
    world.suspect("trainer-0", "")
    assert plan_of(world) == (3, 1, 0)
    assert [placement.shards for placement in world.job().trainers] == [((0, 4),), ((4, 4),)]
    assert "TrainerBack" in world.reasons()


def test_a_suspect_without_others_keeps_its_shards(world: World) -> None:
    world.exit("trainer-1", signal=9)
    world.suspect("trainer-0", "stalled")
    assert [placement.shards for placement in world.job().trainers] == [((0, 8),), ()]
    world.report("trainer-1", TRAINER)
    assert [placement.shards for placement in world.job().trainers] == [(), ((0, 8),)]


def test_a_suspect_that_stays_away_is_replaced(world: World) -> None:
    world.suspect("trainer-0", "silent")
    world.wait(world.limits.trainer_grace_s - 1)
    assert world.wanted()["trainer-0"].process_id == "job-aaaaaa/trainer-0/1"
    world.wait(2)
    assert world.wanted()["trainer-0"].process_id == "job-aaaaaa/trainer-0/2"
    assert not world.job().trainers[0].suspect
    assert "TrainerLost" in world.reasons()


def test_when_all_trainers_are_stuck_none_is_ended(world: World) -> None:
    world.measure("trainer-0", 0.1)
    world.suspect("trainer-0", "stalled")
    world.suspect("trainer-1", "stalled")
    world.wait(world.limits.trainer_grace_s + 5)
    assert {world.wanted()[name].placement.attempt for name in ("trainer-0", "trainer-1")} == {1}
    assert "trainer-0 on worker-0, trainer-1 on worker-1" in world.job().reason
    world.suspect("trainer-1", "")
    assert world.wanted()["trainer-0"].placement.attempt == 2, "one gets on: the other is the one to blame"


def test_a_first_microbatch_has_more_time(world: World) -> None:
    world.suspect("trainer-0", "stalled")
    assert [placement.shards for placement in world.job().trainers] == [(), ((0, 8),)], "others do the work meanwhile"
    world.wait(world.limits.first_grace_s - 1)
    assert world.wanted()["trainer-0"].placement.attempt == 1
    world.wait(2)
    assert world.wanted()["trainer-0"].placement.attempt == 2


def test_a_silent_partition_is_replaced_at_once(world: World) -> None:
    world.suspect("partition-1", "silent")
    assert world.wanted()["partition-1"].process_id == "job-aaaaaa/partition-1/2"
    assert "PartitionLost" in world.reasons()


def test_a_restarted_master_hears_of_a_suspect_from_its_agent(world: World) -> None:
    world.suspect("trainer-0", "silent")
    process = world.state.processes["job-aaaaaa/trainer-0/1"]
    world.restart()
    world.rejoin("worker-1", Process(process_id="job-aaaaaa/trainer-1/1", node_id="worker-1", trainer=TRAINER))
    world.rejoin("worker-0", replace(process, suspect_since_s=0.0))
    assert world.job().trainers[0].suspect
    assert world.wanted()["trainer-0"].process_id == "job-aaaaaa/trainer-0/1", "its time begins anew"


def test_without_any_trainer_the_plan_waits(world: World) -> None:
    world.exit("trainer-0", signal=9)
    world.exit("trainer-1", signal=9)
    assert plan_of(world)[0] == 2
    assert world.job().reason.startswith("waits for a trainer")
    world.report("trainer-1", TRAINER)
    assert plan_of(world)[0] == 3
    assert [placement.shards for placement in world.job().trainers] == [(), ((0, 8),)]


def test_a_lost_partition_takes_the_whole_job_back(world: World) -> None:
    world.commit(*range(6, 14))
    world.snapshot(10)
    old = {name: process.process_id for name, process in world.wanted().items()}
    world.exit("partition-1", signal=9)
    assert plan_of(world) == (1, 1, 0)
    replaced = world.wanted()["partition-1"]
    assert replaced.process_id == "job-aaaaaa/partition-1/2"
    assert replaced.plan is None, "a plan that does not name it would make it restore the wrong step"
    assert "partition-1 on server-1, attempt 2" in world.job().reason
    changes = world.report("partition-1", PARTITION)
    assert plan_of(world) == (2, 2, 10)
    assert changes.cuts == {"job-aaaaaa": 10}
    assert world.job().step == 10
    assert {name: world.wanted()[name].process_id for name in old if name != "partition-1"} == {
        name: process_id for name, process_id in old.items() if name != "partition-1"
    }
    (back,) = [event.message for event in world.events if event.reason == "RolledBack"]
    assert re.search("step 13 .*step 10.*11 to 13", back)
    world.commit(11)
    assert world.job().step == 11


@pytest.mark.parametrize(("reached", "lost"), [(10, False), (11, True)])
def test_going_back_is_a_warning_only_when_a_step_is_lost(world: World, reached: int, lost: bool) -> None:
    world.commit(*range(6, reached + 1))
    world.snapshot(10)
    world.exit("partition-0", signal=9)
    world.ready()
    (event,) = [event for event in world.events if event.reason == "RolledBack"]
    assert (event.warning, "nothing is lost" in event.message) == (lost, not lost)


def test_without_a_snapshot_it_goes_back_to_the_seed() -> None:
    world = World()
    world.cluster()
    world.submit()
    world.ready()
    world.commit(1, 2, 3)
    world.exit("partition-0", exit_code=1)
    world.ready()
    assert plan_of(world) == (2, 2, 0)
    assert world.job().step == 0
    plan = world.job().plan
    assert plan is not None
    assert plan.restore is None


def test_what_was_reported_before_going_back_is_void(world: World) -> None:
    world.commit(*range(6, 14))
    world.snapshot(10)
    world.exit("partition-1", signal=9)
    world.report("partition-1", PARTITION)
    before = world.state
    world.commit(14, 15, generation=1)
    world.snapshot(20, generation=1)
    world.report("partition-0", replace(_finished(world), generation=1))
    assert world.state.jobs == before.jobs
    assert world.state.catalogues == before.catalogues


def _finished(world: World) -> object:
    from psmaster.model.job import Finished

    return Finished(generation=world.job().generation, step=100, stopped=False, parameters_sha256="bad")


def test_a_part_that_was_durable_before_going_back_still_counts(world: World) -> None:
    world.commit(*range(6, 11))
    dead = world.wanted()["partition-1"]
    world.report("partition-0", world.part(10, 0))
    world.exit("partition-1", signal=9)
    world.report_as(dead.placement.node_id, dead.process_id, world.part(10, 1))
    world.report("partition-1", PARTITION)
    assert plan_of(world) == (2, 2, 10)


def test_replaced_processes_have_no_say(world: World) -> None:
    old = world.wanted()["trainer-0"]
    world.exit("trainer-0", signal=9)
    before = world.job()
    for report in (TRAINER, failure("PS-2001", "late")):
        world.report_as(old.placement.node_id, old.process_id, report)
    world.take(lambda tx: tx.exited(old.placement.node_id, old.process_id, Exit(signal=9)))
    assert world.job() == before
    assert old.process_id not in world.state.processes


def test_a_replaced_coordinator_has_no_say(world: World) -> None:
    old = world.wanted()["partition-0"]
    world.exit("partition-0", signal=9)
    before = world.job()
    world.report_as(old.placement.node_id, old.process_id, _finished(world))  # type: ignore[arg-type]
    assert world.job() == before


def test_strangers_and_forgers_have_no_say(world: World) -> None:
    process_id = world.wanted()["trainer-0"].process_id
    before = world.state.jobs
    world.report_as("worker-1", process_id, failure("PS-2001"))
    world.report_as("worker-0", "nobody/trainer-0/1", failure("PS-2001"))
    world.report_as("worker-0", "job-aaaaaa/trainer-9/1", failure("PS-2001"))
    world.report_as("worker-0", "", failure("PS-2001"))
    assert world.state.jobs == before


def test_a_silent_node_is_lost_after_the_suspicion_and_its_trainer_moves(world: World) -> None:
    world.join("worker-2")
    world.ready()
    world.wait(2.9, silent=frozenset({"worker-0"}))
    assert "TrainerLost" not in world.reasons()
    world.wait(0.5, silent=frozenset({"worker-0"}))
    assert "TrainerLost" in world.reasons()
    assert not world.job().trainers[0].placed
    assert world.job().trainers[0].losses == 0
    world.wait(0.5)
    assert world.wanted()["trainer-0"].process_id == "job-aaaaaa/trainer-0/2"


def test_a_frozen_node_that_comes_back_finds_itself_replaced(world: World) -> None:
    frozen = world.wanted()["trainer-0"]
    world.wait(4, silent=frozenset({"worker-0"}))
    world.wait(1)
    assert world.wanted()["trainer-0"].process_id != frozen.process_id
    world.rejoin("worker-0", Process(process_id=frozen.process_id, node_id="worker-0", trainer=TRAINER))
    assert frozen.process_id not in {process.process_id for process in world.wanted().values()}


def test_a_restarted_agent_lost_its_processes(world: World) -> None:
    world.join("worker-0", life="2")
    assert world.wanted()["trainer-0"].process_id == "job-aaaaaa/trainer-0/2"
    assert world.job().trainers[0].losses == 0
    assert any("the daemon of worker-0 was restarted" in event.message for event in world.events)


def test_a_broken_stream_that_is_back_in_time_costs_nothing(world: World) -> None:
    generation = world.job().generation
    world.take(lambda tx: tx.detach("worker-0", world.lives["worker-0"]))
    world.wait(1)
    running = Process(process_id="job-aaaaaa/trainer-0/1", node_id="worker-0", trainer=TRAINER)
    world.rejoin("worker-0", running)
    world.wait(5)
    assert world.job().generation == generation


def test_an_exit_during_a_broken_stream_is_learnt_from_the_hello(world: World) -> None:
    world.take(lambda tx: tx.detach("worker-0", world.lives["worker-0"]))
    gone = Process(process_id="job-aaaaaa/trainer-0/1", node_id="worker-0", trainer=TRAINER, exit=Exit(signal=11))
    world.rejoin("worker-0", gone)
    assert "SIGSEGV" in next(event for event in world.events if event.reason == "TrainerLost").message


def test_losses_without_a_step_in_between_are_bounded(world: World) -> None:
    for _ in range(5):
        world.exit("trainer-0", out_of_memory=True, signal=9)
        world.exit("trainer-1", signal=9)
        world.ready()
        assert world.job().state is JobState.RUNNING
    world.exit("trainer-0", out_of_memory=True, signal=9)
    job = world.job()
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "PS-3006"
    assert "6 times" in job.reason


def test_a_new_step_forgives(world: World) -> None:
    for attempt in range(20):
        world.exit("trainer-0", signal=9)
        world.ready()
        world.commit(6 + attempt)
    assert world.job().state is JobState.RUNNING


def test_steps_repeated_after_going_back_do_not_forgive(world: World) -> None:
    for _ in range(5):
        world.exit("partition-0", signal=9)
        world.ready()
        world.commit(1, 2, 3, 4, 5)
    world.exit("partition-0", signal=9)
    assert world.job().state is JobState.FAILED


def test_a_newcomer_that_cannot_start_leaves_the_job_alone(world: World) -> None:
    world.join("worker-2")
    world.report("trainer-2", failure("PS-2003", "no data here"))
    assert world.job().state is JobState.RUNNING
    assert "NodeLeftOut" in world.reasons()
    assert "trainer-2" not in world.wanted()
    world.join("worker-2", life="2")
    assert world.wanted()["trainer-2"].placement.attempt == 2


def test_a_newcomer_that_always_dies_is_left_out(world: World) -> None:
    world.join("worker-2")
    for _ in range(6):
        world.exit("trainer-2", signal=11)
        world.wait(8)
    assert world.job().state is JobState.RUNNING
    assert "trainer-2" not in world.wanted()


def test_a_newcomer_with_another_model_is_left_out(world: World) -> None:
    world.join("worker-2")
    world.report("trainer-2", replace(TRAINER, layout_sha256="other"))
    assert world.job().state is JobState.RUNNING
    assert any("worker-2 is left out: it built another model" in event.message for event in world.events)


def test_a_trainer_lost_while_a_partition_is_away_is_planned_with_it(world: World) -> None:
    world.exit("partition-0", signal=9)
    world.exit("trainer-0", signal=9)
    assert plan_of(world)[0] == 1
    world.report("partition-0", PARTITION)
    assert plan_of(world) == (2, 2, 0)
    assert [placement.shards for placement in world.job().trainers] == [(), ((0, 8),)]


def test_a_partition_lost_after_the_finish_and_before_its_snapshot_is_recomputed(world: World) -> None:
    world.commit(*range(6, 101))
    world.report("partition-0", world.part(100, 0))
    world.finish()
    world.exit("partition-1", signal=9)
    world.wait(60)
    assert world.job().state is JobState.RUNNING
    world.report("partition-1", PARTITION)
    assert plan_of(world) == (2, 2, 0)
    assert world.job().finished is None
    world.commit(*range(1, 101))
    world.snapshot(100)
    world.finish()
    assert world.job().state is JobState.SUCCEEDED


def test_processes_that_go_home_after_the_finish_are_no_loss(world: World) -> None:
    world.finish()
    world.exit("trainer-0", exit_code=0)
    world.exit("partition-0", exit_code=0)
    assert "TrainerLost" not in world.reasons()
    assert "PartitionLost" not in world.reasons()


def test_stopping_while_a_partition_is_away_ends_at_once(world: World) -> None:
    world.commit(*range(6, 13))
    world.snapshot(10)
    world.exit("partition-0", signal=9)
    world.take(lambda tx: tx.stop("job"))
    assert world.job().state is JobState.STOPPED
    assert "step 10" in world.job().reason


def test_an_unreadable_snapshot_falls_back_to_the_one_before(world: World) -> None:
    for step in (10, 20):
        world.commit(step)
        world.snapshot(step)
    world.exit("partition-0", signal=9)
    world.report("partition-0", PARTITION)
    assert plan_of(world)[2] == 20
    torn = ErrorInfo(code="PS-4002", cause="torn", details=(("void_snapshot", "20"),))
    world.report("partition-0", failure("PS-4002").__class__(error=torn))
    world.report("partition-0", PARTITION)
    assert plan_of(world) == (3, 3, 10)


def test_a_warning_is_reported_and_explains_the_end(world: World) -> None:
    details = (("generation", "1"), ("unwritten", "100"))
    info = ErrorInfo(code="PS-4002", cause="no space left", action="free space", details=details)
    full = JobWarning(step=100, error=info)
    world.report("partition-1", full)
    world.report("partition-1", full)
    assert world.reasons().count("Warning") == 1
    world.finish()
    error = world.job().error
    assert error is not None
    assert "no space left" in error.cause


def test_a_master_restart_changes_nothing_for_the_processes(world: World) -> None:
    world.commit(*range(6, 12))
    world.snapshot(10)
    wanted = world.wanted()
    world.restart()
    assert world.wanted() == wanted
    for node_id in list(world.lives):
        running = tuple(
            Process(
                process_id=process.process_id,
                node_id=node_id,
                trainer=TRAINER if name.startswith("trainer") else None,
                partition=PARTITION if name.startswith("partition") else None,
            )
            for name, process in wanted.items()
            if process.placement.node_id == node_id
        )
        world.rejoin(node_id, *running)
    world.wait(10)
    assert world.wanted() == wanted
    world.commit(12)
    assert world.job().step == 12


def test_a_death_while_the_master_was_away_is_noticed_after_its_restart(world: World) -> None:
    world.snapshot(5)
    world.restart()
    world.join("server-1", life="2")
    assert world.wanted()["partition-1"].process_id == "job-aaaaaa/partition-1/2"
    for node_id in ("worker-0", "worker-1", "server-0"):
        world.rejoin(node_id)
    world.report("partition-1", PARTITION)
    assert plan_of(world) == (2, 2, 5)


def test_readiness_reported_while_the_master_was_away_is_learnt_from_the_hello() -> None:
    world = World()
    world.cluster(1, 1)
    world.submit(servers={"partitions": 1})
    world.restart()
    trainer = Process(process_id="job-aaaaaa/trainer-0/1", node_id="worker-0", trainer=TRAINER)
    partition = Process(process_id="job-aaaaaa/partition-0/1", node_id="server-0", partition=PARTITION)
    world.rejoin("worker-0", trainer)
    world.rejoin("server-0", partition)
    assert plan_of(world) == (1, 1, 0)


def test_everything_killed_at_once_resumes_from_the_newest_snapshot(world: World) -> None:
    world.commit(*range(6, 25))
    world.snapshot(20)
    world.restart()
    for node_id in ("worker-0", "worker-1", "server-0", "server-1"):
        world.join(node_id, life="2")
    world.ready()
    assert plan_of(world)[2] == 20
    assert world.job().state is JobState.RUNNING
    assert {process.placement.attempt for process in world.wanted().values()} == {2}


def test_a_plan_that_is_made_while_all_are_suspected_still_counts_on_them(world: World) -> None:
    """What trainers hear: one of them must send the first values, and all compute what they were dealt."""
    world.suspect("trainer-0", "stalled")
    world.suspect("trainer-1", "stalled")
    world.exit("partition-1", signal=9)
    world.report("partition-1", PARTITION)
    job = world.job()
    assert job.plan is not None and job.plan.restore_generation == job.generation
    received = proto.plan(job, job.plan)
    assert [placement.active for placement in received.trainers] == [True, True]
    world.suspect("trainer-1", "")
    job = world.job()
    assert job.plan is not None
    assert [placement.active for placement in proto.plan(job, job.plan).trainers] == [False, True]
