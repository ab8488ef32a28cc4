"""When a history is over, and what must hold then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from psmaster.model.job import Job, JobState
from psmaster.storage.metrics_file import FILE_NAME
from tests.fault.simulation.invariants import require

RELEASE_S = 8.0  # in which everything of an ended job is gone


def is_over(sim: Any) -> bool:
    """Every job was taken in and has reached its last step, and somebody is there to say so."""
    if sim.master is None or len(sim.people.jobs) < sim.setting.jobs:
        return False
    states = {job.job_id: job.state for job in sim.jobs()}
    return all(states.get(job_id) is JobState.SUCCEEDED for job_id in sim.people.jobs.values())


def check(sim: Any) -> None:
    """The result is there, and nothing else is."""
    sim.calm()
    sim.settle(RELEASE_S, lambda: is_over(sim) and not _left(sim))
    require(is_over(sim), f"a job that had succeeded has not: {describe(sim)}")
    require(not _left(sim), f"of ended jobs something is left: {_left(sim)}")
    for job in sim.jobs():
        _check_job(sim, job)


def _left(sim: Any) -> list[str]:
    """Processes of jobs, nodes that are away, and agents with unacknowledged reports."""
    left = [child.spec.process_id for child in sim.children()]
    left += [agent.node_id for agent in (*sim.agents.values(), *sim.former) if len(agent.report_queue)]
    return left + [node_id for node_id in sim.nodes if node_id not in sim.agents]


def _check_job(sim: Any, job: Job) -> None:
    require(job.step == job.final_step == sim.setting.steps, f"{job.job_id} ended at step {job.step}")
    catalogue = sim.master.core.state.catalogues[job.job_id]
    require(catalogue.complete(job.final_step), f"{job.job_id} has no snapshot of its last step")
    losses = _losses(sim.disk.directory / "jobs" / job.job_id / FILE_NAME)
    steps = list(losses)
    require(steps == sorted(set(steps)), f"{FILE_NAME} of {job.job_id} has the steps {steps}")
    reference = sim.monitor.reference
    if reference is None:
        sim.losses = losses
        return
    for step, loss in losses.items():
        require(loss == reference.losses[step], f"{FILE_NAME} of {job.job_id}: another loss at step {step}")


def _losses(path: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in path.read_text().splitlines():
        data = json.loads(line)
        if "loss" in data:
            require(data["step"] not in found, f"{path.name} has step {data['step']} twice")
            found[data["step"]] = data["loss"]
    return found


def describe(sim: Any) -> str:
    """Where everything stands, in a line, for the message of a failure."""
    jobs = [f"{job.job_id} {job.state} at step {job.step}, {job.reason}" for job in sim.jobs()]
    partitions = [
        f"{watched.process.process_id} at {watched.process.service.member.step}, restored in "
        f"{watched.restore_generation}"
        for watched in sim.monitor._partitions
    ]
    master = "a master" if sim.master is not None else "no master"
    return f"{master}; jobs: {jobs or sim.people.jobs}; partitions: {partitions}"
