"""The stages of reconciliation that end a job. Pure."""

from __future__ import annotations

from dataclasses import replace

from psmaster.model.job import ErrorInfo, Job, JobState, PreflightCheck
from psmaster.model.plan import Placement
from psmaster.model.process import Failure, failure_of
from psmaster.scheduling.draft import Draft, View


def fail_on_reports(draft: Draft, view: View) -> None:
    """FAILED when a process reported what another attempt would meet again.

    Before the first plan it waits for the reports of the others, for one table of all failures."""
    failures = [
        (placement, failure)
        for placement in draft.job.working
        if (failure := failure_of(placement, draft.job, view.processes)) and not _leave_out(draft, placement, failure)
    ]
    if not failures:
        return
    if draft.job.plan is None:
        undecided = [
            placement for placement in draft.job.working if placement.placed and _undecided(placement, draft, view)
        ]
        if undecided and not draft.has_waited(view.limits.gather_s):
            return
        draft.update(checks=_checks(draft, view))
    placement, first = failures[0]
    draft.fail(_with_place(placement, first, [other for other, _ in failures]), first.traceback)


def _leave_out(draft: Draft, placement: Placement, failure: Failure) -> bool:
    """Spare a running job the failure of one newcomer: its node is left out instead."""
    if not draft.is_dispensable(placement):
        return False
    draft.exclude(placement.node_id, placement.incarnation, str(failure.error))
    draft.vacate(placement)
    return True


def _undecided(placement: Placement, draft: Draft, view: View) -> bool:
    process = view.processes.get(placement.process_id(draft.job.job_id))
    return process is None or (process.living and process.trainer is None and process.partition is None)


def _checks(draft: Draft, view: View) -> tuple[PreflightCheck, ...]:
    found: list[PreflightCheck] = []
    for placement in draft.job.trainers:
        process = view.processes.get(placement.process_id(draft.job.job_id))
        facts = (process.trainer or process.failure) if process else None
        found.extend(replace(check, node_id=placement.node_id) for check in (facts.checks if facts else ()))
    return tuple(found)


def _with_place(placement: Placement, failure: Failure, placements: list[Placement]) -> ErrorInfo:
    where = ", ".join(f"{other.name} on {other.node_id}" for other in placements)
    step = f", step {failure.step}" if failure.step else ""
    details = {**dict(failure.error.details), "process": placement.name, "node": placement.node_id}
    cause = f"{failure.error.cause} ({where}{step})"
    return replace(failure.error, cause=cause, details=tuple(sorted(details.items())))


def end_if_finished(draft: Draft, view: View) -> None:
    """SUCCEEDED or STOPPED once the coordinator has finished and the last snapshot is complete.

    It waits without limit: each partition reports that its part is written, or that it cannot be, which fails the job.
    After a request to stop the wait is limited: without that snapshot only steps are lost."""
    finished = draft.job.finished
    if finished is None:
        return
    complete = finished.step == 0 or draft.snapshots.complete(finished.step)
    away = any(not placement.active for placement in draft.job.partitions)
    error = _unwritten(draft.job, finished.step)
    if complete:
        draft.update(parameters_sha256=finished.parameters_sha256)
    if finished.stopped or (draft.job.stopping and not complete):
        if complete or away or error or draft.has_waited(view.limits.finish_grace_s):
            step = finished.step if complete else _newest(draft)
            draft.end(JobState.STOPPED, f"stopped at step {finished.step} on request; it resumes from step {step}")
    elif complete:
        draft.end(JobState.SUCCEEDED, f"reached step {finished.step}, the last one")
    elif error and not away:  # a part that died with its partition is made again
        cause = f"the snapshot of the last step, {finished.step}, is not complete: {error.cause}"
        draft.fail(replace(error, cause=cause))


def _unwritten(job: Job, step: int) -> ErrorInfo | None:
    """Why a partition could not write its part of a step."""
    warning = job.snapshot_warning
    return warning.error if warning is not None and warning.step == step else None


def end_if_stopping(draft: Draft, view: View) -> None:
    """STOPPED at once before the first step or when a partition is gone, else when the coordinator says so or time is
    up."""
    job = draft.job
    if not job.stopping or job.finished is not None:
        return
    if job.state is JobState.STARTING:
        draft.end(JobState.STOPPED, "stopped before its first step" if not job.step else f"stopped at step {job.step}")
    elif any(not placement.active for placement in job.partitions):
        draft.end(JobState.STOPPED, f"stopped while it recovered; it resumes from step {_newest(draft)}")
    else:
        idle = not any(placement.active for placement in job.trainers)
        if draft.has_waited(view.limits.stop_idle_grace_s if idle else view.limits.stop_grace_s):
            why = f"stopped: no step boundary came; it resumes from step {_newest(draft)}"
            draft.end(JobState.STOPPED, why, warning=True)


def _newest(draft: Draft) -> int:
    newest = draft.snapshots.newest()
    return newest.step if newest else 0
