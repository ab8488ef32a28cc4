"""The desired state of a job, given its actual state: one pure function, called after every change.

`desired` lists the processes that should run then. Applying `reconcile` again to its own outcome changes nothing. The
stages are in the order in which they matter: what ends the job, what was lost, where it goes, what joins, the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pscluster.errors import InternalError
from psmaster.model.job import Instant, Job, JobState, enter_state
from psmaster.model.membership import NodeView
from psmaster.model.plan import Placement, Plan, ProcessKind
from psmaster.model.process import Processes
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.scheduling import completion, conditions, drain, planner, recovery, startup
from psmaster.scheduling.admission import admit
from psmaster.scheduling.draft import Draft, Limits, View

_STAGES = (
    completion.fail_on_reports,
    completion.end_if_finished,
    recovery.settle_mismatch,
    recovery.vacate_lost,
    completion.end_if_stopping,
    drain.move_off_draining,
    recovery.fill_placements,
    recovery.end_retry_waits,
    startup.first_plan,
    recovery.activate_ready,
    recovery.mark_suspects,
    planner.replan,
)
_MAX_PASSES = 100  # each pass but the last excludes a node, joins a process or makes a plan; these run out


@dataclass(frozen=True, kw_only=True, slots=True)
class Desired:
    """One process that should run. `plan` is unset until a plan names this very process."""

    process_id: str
    job: Job = field(compare=False, repr=False)
    placement: Placement
    plan: Plan | None


def reconcile(
    job: Job,
    nodes: Mapping[str, NodeView],
    processes: Processes,
    snapshots: Catalogue,
    now: Instant,
    limits: Limits,
    *,
    grow: bool = False,
    ahead: str = "",
) -> Draft:
    """The job's next state, catalogue and events. `grow`: it may take more placements than it has; `ahead`: the job
    whose turn comes before this queued one, empty if it is first."""
    view = View(nodes=nodes, processes=processes, now=now, limits=limits, grow=grow)
    draft = Draft(job, snapshots, now)
    if job.state is JobState.QUEUED:
        _admit(draft, view, ahead)
    if draft.job.state.live:
        _run_stages(draft, view)
    if not draft.job.state.ended:
        draft.update(reason=conditions.reason(draft.job, view, draft.job.reason))
    draft.update(conditions=conditions.conditions(draft.job, now))
    if draft.job == job:
        draft.job = job
    return draft


def desired(job: Job) -> tuple[Desired, ...]:
    """The processes of a job: one for each placement that has a node and need not wait."""
    return tuple(
        Desired(
            process_id=placement.process_id(job.job_id),
            job=job,
            placement=placement,
            plan=job.plan if job.plan is not None and job.plan.names(placement) else None,
        )
        for placement in job.placements
        if placement.placed and not placement.held_back
    )


def _admit(draft: Draft, view: View, ahead: str) -> None:
    job = draft.job
    if job.stopping:
        draft.end(JobState.STOPPED, "stopped while it was queued")
        return
    if ahead:
        draft.update(reason=f"waits for its turn: {ahead} is ahead in the queue")
        return
    admission = admit(job.spec, view.nodes)
    if not admission.trainers:
        draft.update(reason=admission.reason)
        return
    draft.job = replace(
        enter_state(job, JobState.STARTING, "starts"),
        started_s=job.started_s or draft.now.unix_s,
        trainers=tuple(Placement(kind=ProcessKind.TRAINER, rank=rank) for rank in range(len(admission.trainers))),
        partitions=tuple(Placement(kind=ProcessKind.PARTITION, rank=rank) for rank in range(len(admission.partitions))),
        standbys=tuple(
            Placement(kind=ProcessKind.PARTITION, rank=rank, standby=True)
            for rank in range(len(admission.partitions) if job.spec.durability.tier == "replica" else 0)
        ),
    )
    for placement, node_id in zip(draft.job.working, admission.trainers + admission.partitions, strict=True):
        draft.assign_node(placement, view.nodes[node_id])
    trainers, partitions = (", ".join(dict.fromkeys(places)) for places in (admission.trainers, admission.partitions))
    draft.emit("Admitted", f"trainers on {trainers}; partitions on {partitions}")


def _run_stages(draft: Draft, view: View) -> None:
    """Passes over a live job until one changes nothing. Each stage may end it."""
    for _ in range(_MAX_PASSES):
        before = draft.job
        for stage in _STAGES:
            stage(draft, view)
            if draft.job.state.ended:
                return
        if draft.job == before:
            return
    raise InternalError(f"job {draft.job.job_id} does not settle")
