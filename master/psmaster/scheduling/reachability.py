"""Who cannot reach whom on the data plane, though the master hears both: whose place another should take. Pure.

A trainer that cannot reach a partition which others reach is done without, until it can. A partition that no trainer
can reach is given up, if there is room for it elsewhere. Where nothing tells who is at fault (nobody reaches anybody),
or nothing better is at hand, the job waits and says so; the processes go on trying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from psmaster.model.job import Instant, Job
from psmaster.model.plan import Placement
from psmaster.model.process import Processes

GRACE_S = 1.0
"""How long one process's word is not acted upon: others may be about to say the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """`reports`: what each process cannot reach, by the name of its placement, as far as it is told; the others may be
    empty. `trainers`: ranks to do without. `partitions`: indices to give up."""

    reports: Mapping[str, frozenset[int]]
    trainers: frozenset[int] = frozenset()
    partitions: frozenset[int] = frozenset()


NOTHING = Cut(reports={})


def judge(job: Job, processes: Processes, now: Instant) -> Cut:
    """What follows from the connections that cannot be made."""
    if not any(process.unreached.partitions for process in processes.values()):
        return NOTHING
    if job.plan is None or job.finished is not None:
        return NOTHING
    if not all(placement.active and job.plan.holds(placement) for placement in job.partitions):
        return NOTHING  # one is away, or where nobody was told yet: of course it is not reached
    trainers = {
        placement: _told(placement, job, processes) for placement in job.trainers if _counts(placement, job, processes)
    }
    voters = {placement: _told(placement, job, processes) for placement in job.partitions if placement.rank}
    reports = {placement.name: told for placement, told in (trainers | voters).items() if told}
    if not reports:
        return NOTHING
    ripe = {placement for placement in (*trainers, *voters) if _is_ripe(placement, job, processes, now)}
    lost = _lost_to_trainers(trainers, ripe, len(job.partitions)) | _lost_to_voters(voters, ripe)
    cut_off = frozenset(placement.rank for placement, told in trainers.items() if placement in ripe and told - lost)
    return Cut(reports=reports, trainers=cut_off, partitions=lost)


def words(reports: Mapping[str, frozenset[int]]) -> str:
    """The reports for people; empty: there are none."""
    told = [f"{name} {cannot_reach(missing)}" for name, missing in sorted(reports.items())[:4]]
    return "; ".join(told) + ("; ..." if len(reports) > 4 else "")


def cannot_reach(missing: frozenset[int]) -> str:
    """One report for people."""
    return "cannot reach " + ", ".join(f"partition-{index}" for index in sorted(missing))


def _counts(placement: Placement, job: Job, processes: Processes) -> bool:
    """Whether a trainer's word counts: who is silent says nothing new."""
    process = processes.get(placement.process_id(job.job_id))
    return placement.active and process is not None and process.suspicion != "silent"


def _told(placement: Placement, job: Job, processes: Processes) -> frozenset[int]:
    """What it cannot reach of where the partitions are now: addresses change when the job goes back and when a standby
    takes over, and what was said before that is void."""
    process, plan = processes.get(placement.process_id(job.job_id)), job.plan
    if process is None or plan is None:
        return frozenset()
    if process.unreached.generation < max(plan.restore_generation, plan.moved_generation):
        return frozenset()
    return process.unreached.partitions


def _is_ripe(placement: Placement, job: Job, processes: Processes, now: Instant) -> bool:
    process = processes.get(placement.process_id(job.job_id))
    return process is not None and now.mono_s - process.unreached.since_s >= GRACE_S


def _lost_to_trainers(
    trainers: Mapping[Placement, frozenset[int]], ripe: set[Placement], num_partitions: int
) -> frozenset[int]:
    """The partitions that no trainer reaches. Not when it is all of them, for then it may be the trainers' network; but
    several trainers are right about the only one."""
    if not trainers or not any(placement in ripe for placement in trainers):
        return frozenset()
    by_all = frozenset.intersection(*trainers.values())
    if len(by_all) == num_partitions and not (num_partitions == 1 and len(trainers) > 1):
        return frozenset()
    return by_all


def _lost_to_voters(voters: Mapping[Placement, frozenset[int]], ripe: set[Placement]) -> frozenset[int]:
    """Who does not reach the coordinator cannot vote. When several others all do not, it is the coordinator."""
    cut_off = frozenset(placement.rank for placement, told in voters.items() if told and placement in ripe)
    if len(voters) > 1 and len(cut_off) == len(voters):
        return frozenset({0})
    return cut_off
