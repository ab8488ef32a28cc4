"""The reason and the conditions of a job, as shown to users. Pure."""

from __future__ import annotations

from psmaster.model.job import Condition, Instant, Job, JobState
from psmaster.model.plan import Placement, ProcessKind, counted_on
from psmaster.model.process import ready_facts
from psmaster.scheduling import process_losses
from psmaster.scheduling.admission import with_device
from psmaster.scheduling.draft import View

_Row = tuple[str, bool, tuple[str, str], tuple[str, str]]
"""A condition's type and status, its reason and its message, each for when it holds and for when not."""


def reason(job: Job, view: View, queued: str) -> str:
    """One line on a live job. `queued`: the reason from admission, which holds while the job is queued."""
    if job.state is JobState.QUEUED:
        return queued
    if job.finished is not None:
        return f"finished at step {job.finished.step}; waits for its last snapshot"
    if job.state is JobState.STARTING and job.plan is None:
        return _starting(job, view)
    if job.stopping:
        return "stops at the next step boundary"
    away = [placement for placement in job.partitions if not placement.active]
    if away:
        return "recovers: waits for " + ", ".join(_where(placement, job) for placement in away)
    if job.held >= 0:
        return f"pauses at step {job.held}, to move a partition"
    active = counted_on(job.trainers)
    if not active:
        return "waits for a trainer: " + ", ".join(_where(placement, job) for placement in job.trainers)
    doubts = _doubts(job, view)
    if job.state is JobState.STARTING:
        return "waits for the first step" + doubts
    trains = f"trains on {len(active)} worker{'s' if len(active) > 1 else ''}" + _missing(job)
    shortfall = _shortfall(job)
    return trains + doubts + (f"; {shortfall}" if shortfall else "")


def _shortfall(job: Job) -> str:
    """Why partitions are not replicated, in words; empty when all are, or none should be."""
    alone = [placement.rank for placement in job.standbys if not placement.placed]
    behind = [placement for placement in job.standbys if placement.placed and not placement.synced]
    reasons = []
    if alone:
        listed = ", ".join(f"partition-{rank}" for rank in alone)
        reasons.append(f"without standby for {listed}: no other server has room")
    if behind:
        listed = ", ".join(f"{placement.title} on {placement.node_id}" for placement in behind)
        reasons.append(f"not in sync yet: {listed}")
    return "; ".join(reasons)


def _missing(job: Job) -> str:
    """The trainers that are not active, as a suffix. Only one that has a node is on the way."""
    away = [placement for placement in job.trainers if not placement.active]
    coming = sum(1 for placement in away if placement.placed)
    text = f"; {coming} more on the way" if coming else ""
    if len(away) > coming:
        text += f"; no worker{with_device(job.spec.workers.device)} is free for {len(away) - coming} more"
    return text


def _doubts(job: Job, view: View) -> str:
    """The processes that make no progress, as a suffix."""
    cut = process_losses.find_cut(job, view.processes, view.now)
    silent = [placement for placement in job.trainers if placement.suspect and placement.rank not in cut.trainers]
    stuck = ", ".join(f"{placement.name} on {placement.node_id}" for placement in silent)
    return (f"; no progress from {stuck}" if stuck else "") + (
        f"; {process_losses.describe_reports(cut.reports)}" if cut.reports else ""
    )


def _starting(job: Job, view: View) -> str:
    away = [placement for placement in job.working if ready_facts(placement, job, view.processes) is None]
    counts = " and ".join(
        f"{len(placements) - sum(own in away for own in placements)} of {len(placements)} {what}"
        for placements, what in ((job.trainers, "trainers"), (job.partitions, "partitions are ready"))
    )
    shown = ", ".join(_where(placement, job) for placement in away[:4]) + (", ..." if len(away) > 4 else "")
    left_out = "; ".join(f"{node_id} is left out: {why}" for node_id, _, why in job.excluded)
    return counts + (f"; waits for {shown}" if away else "") + (f"; {left_out}" if left_out else "")


def _where(placement: Placement, job: Job) -> str:
    if not placement.placed and placement.kind is ProcessKind.TRAINER:
        return f"a free worker slot{with_device(job.spec.workers.device)} for {placement.name}"
    if not placement.placed:
        return f"a free server slot for {placement.name}"
    again = f", attempt {placement.attempt}" if placement.attempt > 1 else ""
    text = f"{placement.name} on {placement.node_id}{again}"
    if placement.held_back:
        text += f", which starts {process_losses.retry_delay_s(placement.losses):g} s after the last one was lost"
    return text


def conditions(job: Job, now: Instant) -> tuple[Condition, ...]:
    """Admitted, Ready, Progressing, Recovering; `since_s` is kept while a status holds."""
    live = job.state.live
    all_active = live and bool(job.placements) and all(placement.active for placement in job.working)
    partitions = live and bool(job.partitions) and all(placement.active for placement in job.partitions)
    active = sum(1 for placement in job.trainers if placement.active)
    progressing = job.state is JobState.RUNNING and partitions and active > 0
    recovering = live and (job.recovery is not None or (job.plan is not None and not (partitions and active)))
    ended = job.state.value.capitalize() if job.state.ended else ""
    waiting = ended or "Waiting"
    rows: list[_Row] = [
        ("Admitted", live, ("PlacementsHeld", ended or "Queued"), ("placements are held", "no placements are held")),
        ("Ready", all_active, ("AllReady", waiting), ("every process is ready", "not every process is ready")),
        ("Progressing", progressing, ("Training", waiting), ("steps are committed", "no steps are committed")),
        ("Recovering", recovering, ("ProcessLost", "NothingLost"), ("the job recovers from a loss", "nothing is lost")),
    ]
    if job.spec.durability.tier == "replica":
        rows.append(_replicated(job, live, ended))
    before = {condition.type: condition for condition in job.conditions}
    return tuple(
        Condition(
            type=kind,
            status=status,
            reason=reasons[0 if status else 1],
            message=messages[0 if status else 1],
            since_s=held.since_s if (held := before.get(kind)) and held.status == status else now.unix_s,
        )
        for kind, status, reasons, messages in rows
    )


def _replicated(job: Job, live: bool, ended: str) -> _Row:
    """Whether losing any one partition costs no step."""
    shortfall = _shortfall(job)
    why = "NoStandby" if any(not placement.placed for placement in job.standbys) else "CatchingUp"
    messages = ("every partition has a standby in sync", shortfall or "no standby")
    return "Replicated", live and bool(job.standbys) and not shortfall, ("InSync", ended or why), messages
