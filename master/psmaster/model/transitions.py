"""The state machine of jobs. Pure: a transition takes a job and the time, and returns the changed job with the event
that tells people what happened.

    QUEUED -> STARTING -> RUNNING -> SUCCEEDED
       ^         |           |-----> FAILED  --+
       |         |           `-----> STOPPED --+-- resume --> QUEUED
       `---------+ (stop, failure: as from RUNNING)
"""

from __future__ import annotations

from dataclasses import replace

from pscluster.errors import InternalError, StateError
from psmaster.model.job import ErrorInfo, Event, Instant, Job, JobState

_ALLOWED: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.STOPPED, JobState.FAILED}),
    JobState.STARTING: frozenset({JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.STOPPED: frozenset({JobState.QUEUED}),
}


def move(job: Job, state: JobState, reason: str) -> Job:
    """The job in `state`. Raises InternalError for a transition that the state machine does not have."""
    if state not in _ALLOWED[job.state]:
        raise InternalError(f"job {job.job_id} cannot go from {job.state} to {state}")
    return replace(job, state=state, reason=reason)


def end(job: Job, state: JobState, reason: str, now: Instant, *, warning: bool = False) -> tuple[Job, Event]:
    """The job ended as `state`: every placement is released, nothing of it waits any more."""
    ended = replace(
        move(job, state, reason),
        ended_s=now.unix_s,
        trainers=(),
        partitions=(),
        standbys=(),
        excluded=(),
        stopping=False,
        deadline_s=None,
        recovery=None,
        dealing=None,
        saving=False,
        held=-1,
        held_s=None,
        window=(),
    )
    event = Event(time_s=now.unix_s, reason=state.value.capitalize(), message=reason, warning=warning)
    return ended, event


def fail(job: Job, problem: ErrorInfo, now: Instant, traceback: str = "") -> tuple[Job, Event]:
    """The job ended FAILED for `problem`."""
    named = replace(job, error=problem, traceback=traceback)
    return end(named, JobState.FAILED, str(problem), now, warning=True)


def ask_stop(job: Job, now: Instant) -> tuple[Job, Event | None]:
    """The job told to stop. Repeating it changes nothing. Raises StateError when it has ended otherwise."""
    if job.state is JobState.STOPPED or job.stopping:
        return job, None
    if job.state.ended:
        raise StateError(f"job {job.job_id} has ended as {job.state}", action="only a live job can be stopped")
    event = Event(time_s=now.unix_s, reason="StopRequested", message="asked to stop at the next step boundary")
    return replace(job, stopping=True), event


def resume(job: Job, has_snapshot: bool, now: Instant) -> tuple[Job, Event | None]:
    """The stopped or failed job queued again. Repeating it on a live job changes nothing.

    Without a snapshot nothing binds it to the model and data it saw before. Raises StateError when it succeeded, or is
    about to stop.
    """
    if job.state is JobState.SUCCEEDED or job.stopping:
        what = "is stopping" if job.stopping else "has reached its last step"
        raise StateError(f"job {job.job_id} {what}", action="only a stopped or failed job can be resumed")
    if not job.state.ended:
        return job, None
    queued = replace(
        move(job, JobState.QUEUED, "waits for its turn"),
        ended_s=0.0,
        plan=None,
        finished=None,
        trouble=None,
        error=None,
        traceback="",
        parameters_sha256="",
        checks=(),
        connections=(),
    )
    if not has_snapshot:
        queued = replace(
            queued,
            layout_json=b"",
            layout_sha256="",
            data_fingerprint="",
            numerics_mode="",
            numerics_class="",
            optimizer_class="",
            numerics="",
        )
    return queued, Event(time_s=now.unix_s, reason="Resumed", message="queued again")
