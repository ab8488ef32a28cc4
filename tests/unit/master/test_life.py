"""The life of a job, turn by turn: admission, start, running, stop, resume, end, queue."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pscluster.errors import NotFoundError, StateError
from psmaster.model.job import Best, DataConnection, ErrorInfo, JobState, JobWarning, PreflightCheck
from psmaster.model.plan import ProcessKind
from psmaster.model.reports import Connected, Evaluated, is_better
from psmaster.model.state import find
from tests.harness.master_world import PARTITION, TRAINER, World, failure, make_job, make_record


@pytest.fixture
def world() -> World:
    return World()


def test_a_job_waits_for_its_workers_and_says_so(world: World) -> None:
    world.submit(workers={"min": 3})
    assert world.job().state is JobState.QUEUED
    assert re.search("3 workers.* 0 .*2 servers.* 0 ", world.job().reason)
    world.cluster(workers=2)
    assert re.search("3 workers.* 2 ", world.job().reason)
    assert world.wanted() == {}
    world.join("worker-2")
    assert world.job().state is JobState.STARTING
    assert set(world.wanted()) == {"trainer-0", "trainer-1", "trainer-2", "partition-0", "partition-1"}


def test_processes_start_without_a_plan_and_get_one_when_all_are_ready(world: World) -> None:
    world.cluster()
    world.submit()
    assert all(process.plan is None for process in world.wanted().values())
    world.report("trainer-0", TRAINER)
    world.report("partition-0", PARTITION)
    world.report("partition-1", PARTITION)
    assert world.job().plan is None
    assert "1 of 2 trainers and 2 of 2 partitions are ready; waits for trainer-1 on worker-1" in world.job().reason
    world.report("trainer-1", TRAINER)
    plan = world.job().plan
    assert plan is not None
    assert (plan.generation, plan.restore_generation, plan.resume_step, plan.restore) == (1, 1, 0, None)
    assert [placement.shards for placement in plan.trainers] == [((0, 4),), ((4, 4),)]
    assert [placement.addresses for placement in plan.partitions] == [("unix:/x",), ("unix:/x",)]
    assert plan.final_step == 100
    assert all(process.plan == plan for process in world.wanted().values())
    assert world.job().state is JobState.STARTING
    assert world.job().numerics.startswith("strict")


def test_the_first_step_makes_it_running(world: World) -> None:
    world.running()
    assert world.job().step == 5
    assert "2 workers" in world.job().reason
    assert {c.type for c in world.job().conditions if c.status} == {"Admitted", "Ready", "Progressing"}


def test_the_end_releases_everything(world: World) -> None:
    world.running()
    world.commit(*range(6, 101))
    world.snapshot(100)
    world.finish()
    job = world.job()
    assert (job.state, job.step, job.parameters_sha256) == (JobState.SUCCEEDED, 100, "f00d")
    assert world.wanted() == {}
    assert job.ended_s == world.now.unix_s
    assert not any(condition.status for condition in job.conditions)


def test_the_end_waits_for_the_last_snapshot(world: World) -> None:
    world.running()
    world.report("partition-0", world.part(100, 0))
    world.finish()
    assert world.job().state is JobState.RUNNING
    assert "waits for its last snapshot" in world.job().reason
    world.wait(5)
    assert world.job().state is JobState.RUNNING
    world.report("partition-1", world.part(100, 1))
    assert world.job().state is JobState.SUCCEEDED
    assert world.reasons().count("Succeeded") == 1


def test_a_last_snapshot_is_waited_for_however_slow_the_store_is(world: World) -> None:
    world.running()
    world.finish()
    world.wait(120)
    assert world.job().state is JobState.RUNNING
    world.snapshot(100)
    assert world.job().state is JobState.SUCCEEDED


def test_a_last_snapshot_that_cannot_be_written_fails_the_job_at_once(world: World) -> None:
    world.running()
    world.finish()
    world.report("partition-1", unwritten(100))
    job = world.job()
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.cause) == (
        "PS-4002",
        "the snapshot of the last step, 100, is not complete: no space left",
    )


def test_another_warning_does_not_hide_that_the_last_snapshot_cannot_be_written(world: World) -> None:
    world.running()
    world.report("partition-1", unwritten(100))
    for step in (0, 100):
        slow = JobWarning(step=step, error=ErrorInfo(code="PS-4002", cause="a store is not shared"))
        world.report("partition-0", slow)
    world.finish()
    assert world.job().state is JobState.FAILED


@pytest.mark.parametrize("when", ["told before", "told after"])
def test_what_could_not_be_written_before_a_rollback_may_be_written_after_it(world: World, when: str) -> None:
    world.running()
    world.commit(*range(6, 101))
    if when == "told before":
        world.report("partition-1", unwritten(100))
    world.exit("partition-0", signal=9)
    world.report("partition-0", PARTITION)
    if when == "told after":
        world.report("partition-1", unwritten(100))
    world.commit(*range(1, 101))
    world.finish()
    assert world.job().state is JobState.RUNNING
    world.snapshot(100)
    assert world.job().state is JobState.SUCCEEDED


@pytest.mark.parametrize("generation", ["", "x", "-1", "9" * 5000])
def test_a_word_of_no_known_generation_is_told_and_nothing_more(world: World, generation: str) -> None:
    world.running()
    details = (("generation", generation), ("unwritten", "100"))
    info = ErrorInfo(code="PS-4002", cause="no space left", details=details)
    world.report("partition-1", JobWarning(step=100, error=info))
    assert "Warning" in world.reasons()
    world.finish()
    assert world.job().state is JobState.RUNNING


@pytest.mark.parametrize("asked", ["before", "after"])
def test_who_asks_to_stop_does_not_wait_for_ever_for_a_store(world: World, asked: str) -> None:
    world.running()
    if asked == "before":
        world.take(lambda tx: tx.stop("job"))
    world.finish(6, stopped=asked == "before")
    if asked == "after":
        world.wait(120)
        world.take(lambda tx: tx.stop("job"))
    world.wait(599)
    assert world.job().state is JobState.RUNNING
    world.wait(2)
    assert world.job().state is JobState.STOPPED
    assert re.search("step 6.*step 0", world.job().reason)


def unwritten(step: int) -> JobWarning:
    """A partition's word, under the first plan, that its part of a step is not written."""
    details = (("generation", "1"), ("unwritten", str(step)))
    return JobWarning(step=step, error=ErrorInfo(code="PS-4002", cause="no space left", details=details))


def test_a_repeated_finish_changes_nothing(world: World) -> None:
    world.running()
    coordinator = world.wanted()["partition-0"]
    world.snapshot(100)
    world.finish()
    ended = world.job()
    world.report_as(coordinator.placement.node_id, coordinator.process_id, replace(ended.finished, step=7))  # type: ignore[type-var]
    assert world.job() == ended


def test_stop_while_queued_or_starting_is_at_once(world: World) -> None:
    world.submit()
    world.take(lambda tx: tx.stop("job"))
    assert world.job().state is JobState.STOPPED
    world.take(lambda tx: tx.resume("job"))
    world.cluster()
    assert world.job().state is JobState.STARTING
    world.take(lambda tx: tx.stop("job"))
    assert world.job().state is JobState.STOPPED
    assert world.wanted() == {}


def test_stop_while_running_asks_the_coordinator(world: World) -> None:
    world.running()
    world.take(lambda tx: tx.stop("job-aaaaaa"))
    plan = world.job().plan
    assert plan is not None
    assert (plan.stop, plan.generation) == (True, 2)
    assert world.job().state is JobState.RUNNING
    world.take(lambda tx: tx.stop("job-aaaaaa"))
    assert world.job().plan == plan
    world.commit(6)
    world.snapshot(6)
    world.finish(6, stopped=True)
    assert world.job().state is JobState.STOPPED
    assert re.search("step 6.*step 6", world.job().reason)
    world.take(lambda tx: tx.stop("job-aaaaaa"))
    assert world.reasons().count("StopRequested") == 1


def test_a_stop_that_nobody_answers_is_forced_in_the_end(world: World) -> None:
    world.running()
    world.take(lambda tx: tx.stop("job"))
    world.wait(299)
    assert world.job().state is JobState.RUNNING
    world.wait(2)
    assert world.job().state is JobState.STOPPED
    assert "resumes from step 0" in world.job().reason


def test_resume_goes_on_from_the_newest_snapshot_in_newer_processes(world: World) -> None:
    world.running()
    world.commit(*range(6, 14))
    world.snapshot(10)
    world.take(lambda tx: tx.stop("job"))
    world.commit(14)
    world.snapshot(14)
    world.finish(14, stopped=True)
    world.take(lambda tx: tx.resume("job"))
    assert world.job().state is JobState.STARTING
    assert {process.process_id for process in world.wanted().values()} == {
        f"job-aaaaaa/{placement}/2" for placement in ("trainer-0", "trainer-1", "partition-0", "partition-1")
    }
    world.ready()
    plan = world.job().plan
    assert plan is not None
    assert (plan.generation, plan.restore_generation, plan.resume_step, plan.stop) == (3, 3, 14, False)
    assert plan.restore is not None
    assert [part.partition for part in plan.restore.parts] == [0, 1]
    assert "Restored" in world.reasons()
    before = world.job()
    world.take(lambda tx: tx.resume("job"))
    assert world.job() == before


def test_resume_without_a_snapshot_forgets_the_model_and_starts_from_the_seed(world: World) -> None:
    world.cluster()
    world.submit()
    world.report("trainer-0", TRAINER)
    world.report("trainer-1", replace(TRAINER, layout_sha256="other", layout_json=b'{"buckets":[1,3]}'))
    world.report("partition-0", PARTITION)
    world.report("partition-1", PARTITION)
    job = world.job()
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "PS-2004"
    assert re.search(r"trainer-1 on worker-1.*trainer-0 on worker-0.*buckets\[1\]", job.error.cause)
    world.take(lambda tx: tx.resume("job"))
    world.ready()
    assert world.job().plan is not None
    assert world.job().error is None


def test_other_data_on_a_node_fail_the_start(world: World) -> None:
    world.cluster()
    world.submit()
    world.report("trainer-1", replace(TRAINER, data_fingerprint="other"))
    world.ready()
    error = world.job().error
    assert error is not None
    assert error.code == "PS-2003"


def test_trainers_that_compute_other_bits_of_one_microbatch_fail_the_start(world: World) -> None:
    world.cluster()
    world.submit()
    for rank, digest in enumerate("ab"):
        world.report(f"trainer-{rank}", replace(TRAINER, microbatch_digest=digest))
    world.ready()
    error = world.job().error
    assert error is not None
    assert (error.code, error.detail("part")) == ("PS-2007", "process")
    assert re.search(r"trainer-1 on worker-1 and trainer-0 on worker-0 compute different bits", error.cause)


def test_trainers_of_other_classes_or_that_promise_no_bits_may_differ(world: World) -> None:
    world.cluster()
    world.submit()
    world.report("trainer-0", replace(TRAINER, microbatch_digest="a"))
    world.report("trainer-1", replace(TRAINER, microbatch_digest="b", numerics_class="other"))
    world.ready()
    assert world.job().error is None and world.job().microbatch_digest == "a"


def test_a_warning_of_the_preflight_becomes_an_event_once(world: World) -> None:
    world.cluster(2)
    world.submit()
    warned = PreflightCheck(name="purity", ok=True, detail="impure: sample 3", warning=True)
    facts = replace(TRAINER, checks=(warned, replace(warned, name="loss", detail="fine", warning=False)))
    world.report("trainer-0", facts)
    world.report("trainer-1", facts)
    world.ready()
    found = [event for event in world.events if event.reason == "PreflightWarning"]
    assert [(event.message, event.warning) for event in found] == [("impure: sample 3", True)]
    assert [check.warning for check in world.job().checks] == [True, False, True, False]


def test_failures_at_start_are_gathered_into_one_table(world: World) -> None:
    world.cluster(3)
    world.submit()
    bad = PreflightCheck(name="imports", ok=False, detail="no module named x")
    world.report("trainer-0", failure("PS-2001", "no module", checks=(bad,), traceback="Traceback"))
    world.wait(1)
    assert world.job().state is JobState.STARTING
    world.report("trainer-2", failure("PS-2001", "no module", checks=(bad,)))
    world.report("trainer-1", TRAINER)
    world.ready()
    job = world.job()
    assert job.state is JobState.FAILED
    assert [(check.node_id, check.ok) for check in job.checks] == [("worker-0", False), ("worker-2", False)]
    assert job.error is not None
    assert re.search("no module.*trainer-0 on worker-0.*trainer-2 on worker-2", job.error.cause)
    assert job.traceback == "Traceback"
    assert job.reason.startswith("PS-2001"), "the state says already that it failed"


def test_a_failure_at_start_does_not_wait_for_ever_for_the_others(world: World) -> None:
    world.cluster()
    world.submit()
    world.report("trainer-0", failure("PS-2002"))
    world.wait(6)
    assert world.job().state is JobState.FAILED


def test_what_the_users_code_raises_in_mid_run_fails_the_job(world: World) -> None:
    world.running()
    world.report("partition-0", failure("PS-2005", "loss is NaN", step=6))
    job = world.job()
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.detail("process")) == ("PS-2005", "partition-0")
    assert "step 6" in job.reason


def test_the_queue_goes_by_priority_then_age(world: World) -> None:
    world.cluster(workers=1, servers=2)
    world.submit("one-aaaaaa", name="one")
    world.wait(1)
    world.submit("two-aaaaaa", name="two")
    world.wait(1)
    world.submit("urgent-aaaaaa", name="urgent", priority=5)
    assert world.job("one-aaaaaa").state is JobState.STARTING
    assert re.search("1 worker.* 0 free", world.job("urgent-aaaaaa").reason)
    assert "urgent-aaaaaa" in world.job("two-aaaaaa").reason
    world.take(lambda tx: tx.stop("one"))
    assert world.job("urgent-aaaaaa").state is JobState.STARTING
    assert world.job("two-aaaaaa").state is JobState.QUEUED


def test_a_job_that_can_never_run_blocks_nobody(world: World) -> None:
    world.cluster(workers=1)
    world.submit("huge-aaaaaa", name="huge", workers={"min": 5, "max": 5}, priority=9)
    world.submit("small-aaaaaa", name="small")
    assert world.job("small-aaaaaa").state is JobState.STARTING


def test_a_running_job_grows_when_a_node_comes_and_nobody_waits(world: World) -> None:
    world.running(workers=1)
    world.join("worker-1")
    assert world.wanted()["trainer-1"].plan is None
    assert world.job().generation == 1
    world.report("trainer-1", TRAINER)
    plan = world.job().plan
    assert plan is not None
    assert plan.generation == 2
    assert plan.restore_generation == 1
    assert [placement.shards for placement in plan.trainers] == [((0, 4),), ((4, 4),)]


def test_a_running_job_does_not_grow_past_a_waiting_one(world: World) -> None:
    world.running(workers=1)
    world.submit("next-aaaaaa", name="next", workers={"min": 2})
    world.join("worker-1")
    assert set(world.wanted()) == {"trainer-0", "partition-0", "partition-1"}
    assert world.job("next-aaaaaa").state is JobState.QUEUED


def test_kept_steps_reach_the_processes_in_the_same_generation(world: World) -> None:
    world.running()
    for step in (10, 20, 30):
        world.commit(step)
        world.snapshot(step)
    plan = world.wanted()["partition-0"].plan
    assert plan is not None
    assert (plan.generation, plan.kept_steps) == (1, (20, 30))


def test_the_best_snapshot_is_pinned_and_shown_once_complete(world: World) -> None:
    world.running()
    world.commit(*range(6, 11))
    world.report("partition-0", Evaluated(generation=1, step=10, metrics=(("loss", 0.5),)))
    assert world.job().best is None
    world.snapshot(10)
    assert world.job().best is not None
    for step in (20, 30, 40):
        world.commit(step)
        world.snapshot(step)
    assert world.state.catalogues["job-aaaaaa"].complete_steps() == (10, 30, 40)
    world.report("partition-0", Evaluated(generation=1, step=40, metrics=(("loss", 0.4),)))
    world.snapshot(50)
    assert world.state.catalogues["job-aaaaaa"].complete_steps() == (40, 50)


def test_evaluations_are_kept_once(world: World) -> None:
    world.running()
    report = Evaluated(generation=1, step=5, metrics=(("loss", 0.5),))
    assert [line for _, line in world.report("partition-0", report).lines] == [report]
    assert world.report("partition-0", report).lines == ()
    assert dict(world.job().metrics) == {"loss": 0.5}


def test_repeated_progress_adds_no_line(world: World) -> None:
    world.running()
    assert world.commit(4, 5).lines == ()
    lines = world.commit(5, 6, 7).lines
    assert [line.step for _, line in lines] == [6, 7]


def test_skipped_steps_are_counted(world: World) -> None:
    world.running()
    skipped = make_record(6, skipped=True, grad_norm=float("nan"))
    coordinator = world.wanted()["partition-0"]
    assert coordinator.placement.kind is ProcessKind.PARTITION
    from psmaster.model.reports import Progress

    world.report("partition-0", Progress(generation=1, step=6, records=(skipped,)))
    assert world.job().nonfinite == 1


def test_submitting_twice_with_one_request_is_one_job(world: World) -> None:
    job = make_job()
    again = replace(make_job("job-bbbbbb"), request_id=job.request_id)
    ids: list[str] = []
    world.take(lambda tx: ids.append(tx.submit(job)))
    world.take(lambda tx: ids.append(tx.submit(again)))
    assert ids == ["job-aaaaaa", "job-aaaaaa"]
    assert list(world.state.jobs) == ["job-aaaaaa"]


def test_a_job_goes_by_id_or_by_a_name_that_is_its_own(world: World) -> None:
    world.submit("job-aaaaaa")
    assert find(world.state.jobs, "job", world.now).job_id == "job-aaaaaa"
    world.submit("job-bbbbbb")
    assert find(world.state.jobs, "job-bbbbbb", world.now).job_id == "job-bbbbbb"
    with pytest.raises(NotFoundError, match="2 jobs are called"):
        find(world.state.jobs, "job", world.now)
    with pytest.raises(NotFoundError):
        find(world.state.jobs, "nobody", world.now)


def test_jobs_of_one_name_are_told_apart_newest_first(world: World) -> None:
    for age_s in range(10):
        job = replace(make_job(f"job-{age_s}"), request_id=f"{age_s}", created_s=world.now.unix_s - 60.0 * age_s)
        world.take(lambda tx, job=job: tx.submit(job))
    with pytest.raises(NotFoundError) as raised:
        find(world.state.jobs, "job", world.now)
    first, second, *_, last = raised.value.action.split(", job-")
    assert first.endswith("job-0 (QUEUED, submitted 0s ago)")
    assert second == "1 (QUEUED, submitted 1m ago)"
    assert last == "7 (QUEUED, submitted 7m ago), and 2 older ones"


def test_only_what_has_ended_is_deleted(world: World) -> None:
    world.submit()
    with pytest.raises(StateError):
        world.take(lambda tx: tx.delete("job"))
    world.take(lambda tx: tx.stop("job"))
    world.take(lambda tx: tx.delete("job"))
    assert world.state.jobs == {}
    assert world.store.jobs() == ()


def test_what_succeeded_is_neither_stopped_nor_resumed(world: World) -> None:
    world.running()
    world.snapshot(100)
    world.finish()
    for ask in ("stop", "resume"):
        with pytest.raises(StateError):
            world.take(lambda tx, ask=ask: getattr(tx, ask)("job"))  # type: ignore[misc]


def test_the_event_list_is_bounded(world: World) -> None:
    world.running()
    for step in range(10, 5000, 10):
        world.commit(step)
        world.snapshot(step)
    assert len(world.state.events["job-aaaaaa"]) == 200
    assert len(world.store.events("job-aaaaaa")) == 200


def test_a_worse_evaluation_takes_nothing_from_the_best(world: World) -> None:
    world.running()
    for step, loss in ((10, 0.5), (20, 0.7), (30, float("nan")), (40, 0.5)):
        world.commit(step)
        world.report("partition-0", Evaluated(generation=1, step=step, metrics=(("loss", loss),)))
        world.snapshot(step)
    best = world.job().best
    assert best is not None
    assert (best.step, best.value) == (10, 0.5)
    assert world.state.catalogues["job-aaaaaa"].complete_steps() == (10, 30, 40)


def test_what_is_better_follows_the_goal() -> None:
    held = Best(step=10, value=0.5)
    assert is_better(0.6, held, "max")
    assert not is_better(0.6, held, "min")
    assert not is_better(0.5, held, "max")
    assert not is_better(float("nan"), None, "min")


def test_what_a_trainer_is_connected_to_replaces_what_was_known_of_it(world: World) -> None:
    world.running()
    unix = DataConnection(trainer=0, partition=0, transport="unix")
    world.report("trainer-0", Connected(connections=(unix,)))
    other = DataConnection(trainer=1, partition=0, transport="tcp")
    world.report("trainer-1", Connected(connections=(other,)))
    assert world.job().connections == (unix, other)
    world.report("trainer-0", Connected(connections=()))
    assert world.job().connections == (other,)
