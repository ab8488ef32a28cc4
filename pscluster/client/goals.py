"""What a client can wait for, and whether a job has got there. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pscluster.client.frames import last_frame
from pscluster.client.records import Job
from pscluster.errors import JobFailedError, JobStoppedError, PsError, SettingsError, StateError

_STATES = ("running", "succeeded", "failed", "stopped", "ended")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`state`: one of running, succeeded, failed, stopped, ended; or "step" with the step to reach."""

    state: str
    step: int = 0

    def __str__(self) -> str:
        return f"step={self.step}" if self.state == "step" else self.state


def parse_goal(text: str) -> Goal:
    """Read "succeeded", "running", "step=100", ... Raises SettingsError for anything else."""
    word, _, number = text.strip().lower().partition("=")
    if word == "step" and number.isdecimal():
        return Goal(state="step", step=int(number))
    if text.strip().lower() in _STATES:
        return Goal(state=word)
    raise SettingsError(f"cannot wait for {text!r}", action=f"one of {', '.join(_STATES)}, step=N")


def reached(job: Job, goal: Goal) -> bool:
    """Whether `job` is there. Raises the error that says why it never will be."""
    if goal.state == "step" and job.step >= goal.step:
        return True
    if goal.state == "running" and (job.state in ("RUNNING", "SUCCEEDED")):
        return True
    if goal.state == "ended" and job.ended:
        return True
    if job.state == goal.state.upper():
        return True
    if job.ended:
        raise end_error(job) or StateError(
            f"{job.job_id} ended {job.state} at step {job.step}, before {goal}",
            action=f"see `psctl describe {job.job_id}`",
        )
    return False


def end_error(job: Job) -> PsError | None:
    """What an ended job's end means to whoever waited for its success; None: it succeeded.

    details["frame"] of a failed job is where the user's code raised, if that is known."""
    details = {"job_id": job.job_id, "state": job.state, "step": str(job.step)}
    if job.state == "FAILED":
        why = f"{job.error.code}: {job.error.cause}" if job.error else job.reason
        action = job.error.action if job.error and job.error.action else "see `psctl describe`"
        action = action.replace("`psctl describe`", f"`psctl describe {job.job_id}`")
        frame = last_frame(job.traceback)
        details |= {"frame": frame} if frame else {}
        return JobFailedError(f"{job.job_id} failed at step {job.step}: {why}", action=action, details=details)
    if job.state == "STOPPED":
        return JobStoppedError(
            f"{job.job_id} was stopped at step {job.step}",
            action=f"`psctl resume {job.job_id}` goes on from its newest snapshot",
            details=details,
        )
    return None
