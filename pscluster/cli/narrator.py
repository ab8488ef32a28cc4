"""Changes of a job as lines for a person. Pure: states in, lines out; time is an argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pscluster.cli import formatting as fmt
from pscluster.cli.describe import counts_tokens, eta_s

if TYPE_CHECKING:
    from pscluster.client import Event, Job

LINE_INTERVAL_S = 2.0
_FRESH_S = 5.0
"""A warning older than this when following begins is printed with its age."""
# States, bar and last lines show these already; `psctl describe` has them all.
_ROUTINE = frozenset({"Submitted", "Admitted", "Running", "Snapshot", "Finished", "Succeeded", "Failed", "Stopped"})


class Narrator:
    """Prints each change of state or reason, each new event and each evaluation once, in order."""

    def __init__(self) -> None:
        self._state = ""
        self._reason = ""
        self._last_event: Event | None = None
        self._evaluated: int | None = None
        self._seen_any = False

    def news(self, job: Job, now_s: float) -> list[str]:
        """The lines to print for this state of the job."""
        lines = self._events(job) if self._seen_any else self._first_events(job, now_s)
        if job.events:
            self._last_event = job.events[-1]
        if (job.state, job.reason) != (self._state, self._reason):
            # A reason may change while a job waits or recovers; the end has its own line.
            if not job.ended and (job.state != self._state or job.reason):
                lines.append(f"{job.state}{': ' + fmt.one_line(job.reason) if job.reason else ''}")
            self._state, self._reason = job.state, job.reason
        if job.metrics and job.metrics_step != self._evaluated:
            if self._seen_any or not job.ended:
                lines.append(evaluation_line(job))
            self._evaluated = job.metrics_step
        self._seen_any = True
        return lines

    def _events(self, job: Job) -> list[str]:
        """Events after the last printed one."""
        fresh = list(job.events)
        if self._last_event in fresh:
            fresh = fresh[len(fresh) - fresh[::-1].index(self._last_event) :]
        return [event_line(event) for event in fresh if _is_warning(event) or not _is_routine(event, job)]

    def _first_events(self, job: Job, now_s: float) -> list[str]:
        """Only warnings since the job was last resumed; the history is in `psctl describe`. An old one is printed with
        its age, so that it does not look new."""
        resumed = max((n for n, event in enumerate(job.events) if event.reason == "Resumed"), default=-1)
        warnings = [event for event in job.events[resumed + 1 :] if _is_warning(event)]
        return [event_line(e, now_s - e.time_s if now_s - e.time_s > _FRESH_S else None) for e in warnings]


def _is_warning(event: Event) -> bool:
    """Whether it must be printed in any case. The error that ends the job is not: it is the last line anyway."""
    return event.warning and event.reason != "Failed"


def _is_routine(event: Event, job: Job) -> bool:
    return event.reason in _ROUTINE or (event.reason == "Planned" and job.step == 0)


def event_line(event: Event, age_s: float | None = None) -> str:
    """One event; with its age if that is given."""
    when = f"{fmt.duration(age_s)} ago: " if age_s is not None else ""
    return f"{'! ' if event.warning else ''}{when}{event.reason}: {fmt.one_line(event.message)}"


def evaluation_line(job: Job) -> str:
    values = ", ".join(f"{name} {fmt.number(value)}" for name, value in sorted(job.metrics.items()))
    best = " (best)" if job.best and job.best.step == job.metrics_step else ""
    return f"evaluated step {job.metrics_step}: {values}{best}"


def progress_line(job: Job) -> str:
    """One plain line of progress."""
    return "  ".join(progress_parts(job))


def progress_parts(job: Job) -> list[str]:
    """Its parts: step, loss, speed, time left, workers."""
    parts = [f"step {job.step}/{job.final_step}" if job.final_step else f"step {job.step}"]
    parts.append(f"loss {fmt.number(job.loss)}")
    parts += rates(job)
    left = eta_s(job)
    parts.append(f"{fmt.duration(left)} left" if left is not None else "")
    parts.append(f"{job.workers_active}/{job.workers_wanted} workers")
    return [part for part in parts if part]


def rates(job: Job) -> list[str]:
    """Tokens per second, or samples where the task counts no tokens; nothing before there is a rate."""
    if counts_tokens(job):
        return [f"{fmt.count(job.weight_per_s)} tokens/s"]
    return [f"{fmt.count(job.samples_per_s)} samples/s"] if job.samples_per_s > 0 else []


def ending_line(job: Job) -> str:
    """The line about how the job ended."""
    ran = fmt.duration((job.ended_s or 0) - job.started_s) if job.started_s else "0s"
    parts = [f"{job.job_id} {job.state} at step {job.step} after {ran}"]
    if job.loss is not None:
        parts.append(f"loss {fmt.number(job.loss)}")
    if job.parameters_sha256:
        parts.append(f"parameters {job.parameters_sha256[:12]}")
    return ", ".join(parts)


class ProgressRate:
    """Lets a progress line through at most every LINE_INTERVAL_S, and only when the step has changed."""

    def __init__(self) -> None:
        self._last_s = float("-inf")
        self._step = -1

    def allows(self, step: int, now_s: float) -> bool:
        if step == self._step or now_s - self._last_s < LINE_INTERVAL_S:
            return False
        self._last_s, self._step = now_s, step
        return True
