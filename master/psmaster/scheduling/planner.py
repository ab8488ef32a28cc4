"""The stage of reconciliation that makes plans: when a new generation is due, and what is in it. Pure."""

from __future__ import annotations

from dataclasses import replace

from psmaster.model import snapshot_catalog
from psmaster.model.job import Job, RebalanceState
from psmaster.model.plan import Placement, Plan, counted_on, process_keys
from psmaster.scheduling import rebalance
from psmaster.scheduling.draft import Draft, View


def replan(draft: Draft, view: View) -> None:
    """Make a plan of a new generation when its trainers, its partitions or a request to stop have changed, or when
    moving shards makes steps faster. New kept steps go into the plan in force.

    While a partition is away there is no new plan: nothing can be committed. The next one restores, unless a standby in
    sync has the placement and the job is not to go back."""
    job, plan = draft.job, draft.job.plan
    if plan is None or any(not placement.active for placement in job.partitions):
        return
    new = [placement for placement in job.partitions if not plan.holds(placement)]
    if new:
        if any(placement.active for placement in job.trainers):
            make_plan(draft, view, restore=job.going_back or not all(placement.synced for placement in new))
    elif job.going_back:
        if any(placement.active for placement in job.trainers):
            make_plan(draft, view, restore=True)
    elif _is_stale(job, plan, view):
        make_plan(draft, view, restore=False)
    elif move := rebalance.due(job, rebalance.trainers_for_shards(job, view.nodes), view.processes, view.now):
        draft.emit(move.reason, move.message, warning=move.warning)
        draft.update(assignment=move.assignment)
        make_plan(draft, view, restore=False, probe=move.probe)
    elif job.assignment is None:
        # A restarted master begins to measure.
        draft.update(assignment=RebalanceState(since_s=view.now.mono_s, step=job.step))
    kept = snapshot_catalog.kept_steps(draft.snapshots, draft.job.pinned)
    if draft.job.plan is not None and kept != draft.job.plan.kept_steps:
        draft.update(plan=replace(draft.job.plan, kept_steps=kept))


def _is_stale(job: Job, plan: Plan, view: View) -> bool:
    """Whether the plan counts on others than there are, has shards where none should be, or asks for something else."""
    active = process_keys(counted_on(job.trainers))
    standing_by = process_keys(placement for placement in job.standbys if placement.active)
    if active and (active, standing_by) != (process_keys(counted_on(plan.trainers)), process_keys(plan.standbys)):
        return True
    if (job.stopping, job.saving) != (plan.stop, plan.save):
        return True
    with_shards = rebalance.trainers_for_shards(job, view.nodes)
    return any(placement.shards for placement in job.trainers if placement not in with_shards)


def make_plan(draft: Draft, view: View, *, restore: bool, probe: int = -1) -> None:
    """The plan of the next generation over the placements that are active; with `restore`, from the newest snapshot.

    `probe`: the rank that gets one shard to be measured again; -1: each gets shards by its speed."""
    job = draft.job
    generation = job.generation + 1
    old = job.plan or Plan(generation=0, trainers=(), partitions=(), restore_generation=generation)
    speeds = rebalance.measured_speeds(rebalance.trainers_for_shards(job, view.nodes), job.job_id, view.processes)
    runs = rebalance.assign_shards(job.num_shards, speeds, probe)
    trainers = tuple(replace(placement, shards=runs.get(placement.rank, ())) for placement in job.trainers)
    taken = [] if restore else [own.rank for own in job.partitions if not old.holds(own)]
    partitions = tuple(replace(placement, synced=True) for placement in job.partitions)
    plan = replace(
        old,
        generation=generation,
        trainers=trainers,
        partitions=partitions,
        standbys=tuple(replace(placement, synced=False) for placement in job.standbys if placement.active),
        moved_generation=generation if taken else old.moved_generation,
        coordinator_generation=generation if 0 in taken else old.coordinator_generation,
        restore_generation=generation if restore else old.restore_generation,
        stop=job.stopping,
        save=job.saving,
        final_step=job.final_step,
    )
    draft.update(trainers=trainers, partitions=partitions, plan=plan, generation=generation)
    if job.recovery is not None:
        draft.update(recovery=replace(job.recovery, generation=generation))
    if restore:
        _restore(draft, plan, fresh=job.plan is None, rested=old.save)
    assignment = job.assignment or RebalanceState(since_s=0.0, step=0)
    draft.update(assignment=replace(assignment, since_s=view.now.mono_s, step=draft.job.step, probe=probe))
    draft.emit("Planned", f"generation {generation}: " + _assigned(trainers))


def _restore(draft: Draft, plan: Plan, *, fresh: bool, rested: bool) -> None:
    """Take the whole job back to its newest complete snapshot, or to the seed. `rested`: there it was asked to rest."""
    job = draft.job
    draft.snapshots = snapshot_catalog.settle_for_restore(draft.snapshots)
    point = draft.snapshots.newest()
    step = point.step if point else 0
    stale, warning = job.metrics_step > step, job.snapshot_warning
    draft.update(
        plan=replace(plan, resume_step=step, restore=point if step else None),
        standbys=tuple(replace(placement, synced=False) for placement in job.standbys),
        step=step,
        finished=None,
        snapshot_warning=None if warning is not None and warning.step > step else warning,  # it is written anew
        deadline_s=None,
        going_back=False,
        audits=job.audits.after_rollback(step),
        next_best=None,
        best=job.best if job.best and job.best.step <= step else None,
        metrics=() if stale else job.metrics,
        metrics_step=0 if stale else job.metrics_step,
        window=(),
    )
    draft.cut_to = step
    where = f"the snapshot of step {step}" if step else "the seed"
    if rested and job.step <= step:
        draft.emit("Moved", f"continues from {where}, where it paused")
    elif not fresh:
        lost = job.step > step
        draft.emit("RolledBack", f"went back from step {job.step} to {where}{_again(step, job.step)}", warning=lost)
    elif plan.generation > 1:
        draft.emit("Restored", f"continues from {where}{_again(step, job.step)}", warning=job.step > step)


def _again(step: int, reached: int) -> str:
    """What was lost: the steps that are computed a second time."""
    if reached <= step:
        return "; nothing is lost"
    if reached == step + 1:
        return f"; step {reached} is computed again"
    return f"; steps {step + 1} to {reached} are computed again"


def _assigned(trainers: tuple[Placement, ...]) -> str:
    active = counted_on(trainers)
    listed = ", ".join(f"{placement.name} {_run_text(placement)}" for placement in active[:8])
    return f"shards assigned to {listed}" + (", ..." if len(active) > 8 else "") if active else "no trainer is active"


def _run_text(placement: Placement) -> str:
    return ", ".join(f"{first}-{first + count - 1}" for first, count in placement.shards) or "none"
