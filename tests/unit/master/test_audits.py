"""What audits report: counted once, voided by a rollback; a named node is left out, else the job fails."""

from __future__ import annotations

import pytest

from psmaster.model.audits import AuditRecord, Audits, VouchedNode
from psmaster.model.job import AuditMismatch, ErrorInfo, JobState
from psmaster.model.reports import Progress
from tests.harness.master_world import TRAINER, World

ERROR = ErrorInfo(code="PS-3007", cause="audit of step 7: trainer-1 on worker-1 differs", details=(("step", "7"),))


@pytest.fixture
def world() -> World:
    world = World()
    world.running(workers=3)
    return world


def mismatch(world: World, node_id: str, *, generation: int | None = None) -> None:
    generation = world.job().generation if generation is None else generation
    world.report("partition-0", AuditMismatch(generation=generation, step=7, node_id=node_id, error=ERROR))


def audits(world: World, *records: AuditRecord, step: int = 6) -> Audits:
    report = Progress(generation=world.job().generation, step=step, audits=records)
    world.report("partition-0", report)
    world.report("partition-0", report)
    return world.job().audits


def record(step: int, result: str, *nodes: str) -> AuditRecord:
    return AuditRecord(step=step, result=result, nodes=nodes)


def test_audits_are_counted_once_and_say_how_far_they_vouch(world: World) -> None:
    found = audits(
        world,
        record(3, "equal", "worker-0", "worker-1"),
        record(4, "unfinished", "worker-1", "worker-2"),
        record(5, "equal", "worker-2"),
        record(6, "equal", "worker-0", "worker-1"),
        record(7, "differing", "worker-1", "worker-2"),
    )
    assert (found.equal, found.differing, found.unfinished) == (3, 1, 1)
    assert found.vouched == (
        VouchedNode(node_id="worker-0", step=6),
        VouchedNode(node_id="worker-1", step=6),
        VouchedNode(node_id="worker-2", step=5, alone=True),
    )
    world.restart()
    assert world.job().audits == found


def test_the_named_node_is_left_out_and_the_job_goes_back(world: World) -> None:
    world.snapshot(4)
    audits(world, record(6, "equal", "worker-0", "worker-1"), record(7, "differing", "worker-1", "worker-2"))
    mismatch(world, "worker-1")
    job = world.job()
    assert job.plan is not None
    assert (job.plan.resume_step, job.plan.restore_generation, job.step) == (4, job.generation, 4)
    assert [(own.node_id, bool(own.shards)) for own in job.trainers] == [
        ("worker-0", True), ("", False), ("worker-2", True),
    ]  # fmt: skip
    assert [node_id for node_id, *_ in job.excluded] == ["worker-1"]
    assert (job.mismatch, job.going_back) == (None, False)
    assert {"AuditMismatch", "NodeLeftOut", "RolledBack"} <= set(world.reasons())
    assert [own.step for own in job.audits.vouched] == [4, 4], "what is computed again is not vouched for"
    assert job.audits.differing == 1
    world.wait(20)
    assert "trainer-1" not in world.wanted(), "the node is not used again"
    world.commit(5, 6)
    assert "Recovered" in world.reasons()


def test_a_node_whose_agent_was_restarted_is_tried_again(world: World) -> None:
    mismatch(world, "worker-1")
    world.join("worker-1", life="2")
    assert world.wanted()["trainer-1"].placement.node_id == "worker-1"


def test_without_a_named_node_the_job_fails_by_name(world: World) -> None:
    mismatch(world, "")
    job = world.job()
    assert (job.state, job.error) == (JobState.FAILED, ERROR)
    assert (job.mismatch, job.going_back) == (None, False), "a resumed job begins anew"


def test_repeats_and_what_a_restore_made_void_change_nothing(world: World) -> None:
    world.snapshot(4)
    before = world.job().generation
    mismatch(world, "worker-1")
    generation = world.job().generation
    mismatch(world, "worker-1", generation=before)
    mismatch(world, "", generation=before)
    assert (world.job().state, world.job().generation) == (JobState.RUNNING, generation)


def test_the_job_goes_back_once_a_trainer_is_there(world: World) -> None:
    """Meanwhile the master is restarted."""
    world.snapshot(4)
    for name in ("trainer-0", "trainer-2"):
        world.exit(name, signal=9)
    mismatch(world, "worker-1")
    generation = world.job().generation
    processes = world.state.processes
    world.restart()
    for node_id in world.lives:
        world.rejoin(node_id, *(process for process in processes.values() if process.node_id == node_id))
    assert (world.job().going_back, world.job().generation) == (True, generation)
    world.report("trainer-0", TRAINER)
    job = world.job()
    assert job.plan is not None
    assert (job.plan.resume_step, job.plan.restore_generation, job.going_back) == (4, job.generation, False)
