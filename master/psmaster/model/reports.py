"""What the coordinator and the partitions report about a job, applied to it. Pure; repeats change nothing, nor do
reports of a generation before the job's newest restore: moving shards voids nobody's work, going back does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from psmaster.model import snapshot_catalog
from psmaster.model.audits import AuditRecord
from psmaster.model.job import (
    AuditMismatch,
    Best,
    DataConnection,
    Event,
    Finished,
    Instant,
    Job,
    JobState,
    JobWarning,
    StepRecord,
    enter_state,
)
from psmaster.model.plan import Part, Placement
from psmaster.model.snapshot_catalog import Catalogue

RATE_WINDOW_S = 10.0
MAX_POINTS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    generation: int
    step: int
    records: tuple[StepRecord, ...] = ()
    held: bool = False
    audits: tuple[AuditRecord, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Connected:
    """The data-plane connections that one trainer holds."""

    connections: tuple[DataConnection, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    generation: int
    step: int
    metrics: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StandbyState:
    """A partition's report on its standby, the process `attempt`: it is in sync, or it does not answer."""

    generation: int
    attempt: int
    in_sync: bool
    detail: str = ""


MetricLine = StepRecord | Evaluated
"""What becomes one line of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """`lines` are new in metrics.jsonl, in order."""

    job: Job
    events: tuple[Event, ...] = ()
    lines: tuple[MetricLine, ...] = ()


def progress(job: Job, report: Progress, now: Instant) -> Applied:
    """Committed steps. The first one makes the job RUNNING."""
    if not job.state.live or not job.counts(report.generation):
        return Applied(job=job)
    records = tuple(record for record in report.records if record.step > job.step)
    step = max([job.step, report.step, *(record.step for record in records)])
    events: list[Event] = []
    if job.state is JobState.STARTING and step > job.step:
        job = enter_state(job, JobState.RUNNING, "trains")
        events.append(Event(time_s=now.unix_s, reason="Running", message=f"committed step {step}"))
    if records:
        last = records[-1]
        job = replace(
            job,
            loss=last.loss,
            grad_norm=last.grad_norm,
            nonfinite=job.nonfinite + sum(record.skipped for record in records),
            window=_window(job.window, records),
        )
    job, recovered = _end_recovery(job, report.generation, step > job.step, now)
    if step > job.high_step:
        job = _reset_losses(replace(job, high_step=step))
    held = report.step if _is_held(job, report) else job.held
    job = replace(job, step=step, held=held, audits=job.audits.plus(report.audits))
    return Applied(job=job, events=(*events, *recovered), lines=records)


def _is_held(job: Job, report: Progress) -> bool:
    """Whether nothing is computed beyond the reported step: as the newest plan asked, not an older one."""
    return report.held and job.saving and job.plan is not None and job.plan.save and report.generation == job.generation


def _window(window: tuple[StepRecord, ...], records: tuple[StepRecord, ...]) -> tuple[StepRecord, ...]:
    everything = [*window, *records][-MAX_POINTS:]
    recent = [point for point in everything if everything[-1].time_s - point.time_s <= RATE_WINDOW_S]
    return tuple(recent if len(recent) >= 2 else everything[-2:])  # a rate needs a span, however slow the steps


def _end_recovery(job: Job, generation: int, advanced: bool, now: Instant) -> tuple[Job, tuple[Event, ...]]:
    """The first step committed under the plan that answered a loss ends the recovery."""
    held = job.recovery
    if held is None or not advanced or held.generation == 0 or generation < held.generation:
        return job, ()
    seconds = now.mono_s - held.since_s
    message = f"steps go on {seconds:.1f} s after a {held.kind} was lost"
    event = Event(time_s=now.unix_s, reason="Recovered", message=message, subject=held.kind.value, seconds=seconds)
    return replace(job, recovery=None), (event,)


def _reset_losses(job: Job) -> Job:
    """A step beyond all earlier ones: what was lost before no longer counts against placements that work."""
    if not any(placement.losses and placement.active for placement in job.working):
        return job
    trainers, partitions = (
        tuple(replace(placement, losses=0) if placement.active else placement for placement in placements)
        for placements in (job.trainers, job.partitions)
    )
    return replace(job, trainers=trainers, partitions=partitions)


def evaluated(job: Job, report: Evaluated, snapshots: Catalogue) -> Applied:
    """A finished evaluation; the step it was made at is never evaluated twice in the record.

    When it is the best so far its step is pinned at once, and shown as the best once its snapshot is complete."""
    if job.state.ended or not job.counts(report.generation) or (job.metrics and report.step <= job.metrics_step):
        return Applied(job=job)
    value = dict(report.metrics).get(job.spec.evaluate.metric, math.nan)
    if is_better(value, job.next_best or job.best, job.spec.evaluate.goal):
        job = promote(replace(job, next_best=Best(step=report.step, value=value)), snapshots)
    return Applied(job=replace(job, metrics=report.metrics, metrics_step=report.step), lines=(report,))


def is_better(value: float, held: Best | None, goal: str) -> bool:
    """Whether an evaluation beats the best so far; an equal one does not, and what is not a number never does."""
    if math.isnan(value):
        return False
    return held is None or (value < held.value if goal == "min" else value > held.value)


def promote(job: Job, snapshots: Catalogue) -> Job:
    """The job with its reported best as the best, once that snapshot is complete."""
    if job.next_best is None or not snapshots.complete(job.next_best.step):
        return job
    return replace(job, best=job.next_best, next_best=None)


def connected(job: Job, report: Connected, trainer: int) -> Applied:
    """It replaces what was known of that trainer."""
    if job.state.ended:
        return Applied(job=job)
    others = [held for held in job.connections if held.trainer != trainer]
    now_known = sorted((*others, *report.connections), key=lambda c: (c.trainer, c.partition))
    return Applied(job=replace(job, connections=tuple(now_known)))


def standby_state(job: Job, report: StandbyState, rank: int, now: Instant) -> Applied:
    """Partition `rank` reports on its standby. A report on a former standby, or from before a restore, changes nothing.
    A standby that does not answer is given up, since the partition's steps wait for a plan without it."""
    held = job.standby(rank)
    is_current = held is not None and held.attempt == report.attempt and job.counts(report.generation)
    if job.state.ended or held is None or not is_current or not held.active or (report.in_sync and held.synced):
        return Applied(job=job)
    if report.in_sync:
        placement = replace(held, synced=True, losses=0)
        message = f"{held.title} on {held.node_id} is {report.detail}"
        event = Event(time_s=now.unix_s, reason="StandbyInSync", message=message)
    else:
        placement = Placement(kind=held.kind, rank=rank, standby=True, losses=held.losses + 1)
        message = f"{held.title} on {held.node_id} is given up: {report.detail}"
        event = Event(time_s=now.unix_s, reason="StandbyLost", message=message, warning=True)
    placements = tuple(placement if own.rank == rank else own for own in job.standbys)
    return Applied(job=replace(job, standbys=placements), events=(event,))


def audit_mismatch(job: Job, report: AuditMismatch, now: Instant) -> Applied:
    """Two trainers differ, and the step is not committed. Scheduling leaves a node out, or fails the job."""
    if not job.state.live or not job.counts(report.generation) or job.mismatch is not None or job.going_back:
        return Applied(job=job)
    event = Event(time_s=now.unix_s, reason="AuditMismatch", message=str(report.error), warning=True)
    return Applied(job=replace(job, mismatch=report), events=(event,))


def finished(job: Job, report: Finished, now: Instant) -> Applied:
    """The coordinator reports that training has ended. A repeat changes nothing."""
    if not job.state.live or not job.counts(report.generation) or job.finished is not None:
        return Applied(job=job)
    event = Event(time_s=now.unix_s, reason="Finished", message=f"the coordinator finished at step {report.step}")
    step = max(job.step, report.step)
    return Applied(job=replace(job, finished=report, step=step, deadline_s=None), events=(event,))


def snapshot_part(job: Job, snapshots: Catalogue, part: Part, now: Instant) -> tuple[Applied, Catalogue]:
    """One part is durable. Of an ended job too: its last parts may arrive after its end."""
    if not job.counts(part.generation) or snapshot_catalog.is_outrun(snapshots, part.step, job.pinned):
        return Applied(job=job), snapshots
    was_complete = snapshots.complete(part.step)
    added = snapshot_catalog.add(snapshots, part)
    job = promote(job, added)
    kept = snapshot_catalog.prune(added, job.pinned)
    if was_complete or not added.complete(part.step) or not kept.complete(part.step):
        return Applied(job=job), kept
    event = Event(time_s=now.unix_s, reason="Snapshot", message=f"the snapshot of step {part.step} is complete")
    return Applied(job=job, events=(event,)), kept


def warning(job: Job, report: JobWarning, source: str, now: Instant) -> Applied:
    """An error that training survives becomes an event, and is kept if it is a part that could not be written: the
    last step may be one with such a part. What a rollback has made void since then is written anew.

    A best step whose snapshot is not written is not waited for: a later one may be the best of those there are."""
    if job.state.ended or job.snapshot_warning == report:
        return Applied(job=job)
    counts = report.is_unwritten and job.counts(report.generation)
    if counts and job.next_best is not None and report.step == job.next_best.step:
        job = replace(job, next_best=None)
    message = f"{source}, step {report.step}: {report.error}"
    event = Event(time_s=now.unix_s, reason="Warning", message=message, warning=True)
    if counts and (job.snapshot_warning is None or report.step >= job.snapshot_warning.step):
        job = replace(job, snapshot_warning=report)
    return Applied(job=job, events=(event,))


class Rates(NamedTuple):
    steps_per_s: float = 0.0
    samples_per_s: float = 0.0
    weight_per_s: float = 0.0


def rates(job: Job, now: Instant) -> Rates:
    """Speed over the last ten seconds or so; zero once steps have stopped coming."""
    points = job.window
    if job.state is not JobState.RUNNING or len(points) < 2:
        return Rates()
    span = points[-1].time_s - points[0].time_s
    per_step = span / (len(points) - 1)
    silence = now.unix_s - points[-1].time_s
    if span <= 0 or silence > RATE_WINDOW_S + 3 * per_step or math.isnan(span):
        return Rates()
    later = points[1:]
    return Rates(
        steps_per_s=(points[-1].step - points[0].step) / span,
        samples_per_s=sum(point.samples for point in later) / span,
        weight_per_s=sum(point.weight for point in later) / span,
    )
