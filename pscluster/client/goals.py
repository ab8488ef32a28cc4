"""What a client can wait for: a state or step of a job, a drained node. Pure; time is an argument."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from pscluster import errors
from pscluster.client.records import Job, Node

_STATES = ("running", "succeeded", "failed", "stopped", "ended")
_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+)(?:, in (?P<name>.+))?$', re.MULTILINE)
DRAINED = "drained"
POLL_S = 0.25
MAX_OUTAGE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`state`: one of running, succeeded, failed, stopped, ended; or "step" with the step to reach."""

    state: str
    step: int = 0

    def __str__(self) -> str:
        return f"step={self.step}" if self.state == "step" else self.state


def parse_goal(text: str) -> Goal:
    """Read "succeeded", "running", "step=100", ... Raises SettingsError for anything else."""
    keyword, _, number = text.strip().lower().partition("=")
    if keyword == "step" and number.isdecimal():
        return Goal(state="step", step=int(number))
    if text.strip().lower() in _STATES:
        return Goal(state=keyword)
    raise errors.SettingsError(f"cannot wait for {text!r}", action=f"one of {', '.join(_STATES)}, step=N")


def reached(job: Job, goal: Goal) -> bool:
    """Whether `job` has reached `goal`. Raises the reason when it never will."""
    further = {"step": job.step >= goal.step, "running": job.state == "SUCCEEDED", "ended": job.ended}
    if job.state == goal.state.upper() or further.get(goal.state):
        return True
    if job.ended:
        raise end_error(job) or errors.StateError(
            f"{job.job_id} ended {job.state} at step {job.step}, before {goal}",
            action=f"see `psctl describe {job.job_id}`",
        )
    return False


def end_error(job: Job) -> errors.PsError | None:
    """The error of a job that has ended without success, with details["frame"], where the user's code raised, if known;
    None: it succeeded."""
    details = {"job_id": job.job_id, "state": job.state, "step": str(job.step)}
    if job.state == "FAILED":
        why = f"{job.error.code}: {job.error.cause}" if job.error else job.reason
        action = job.error.action if job.error and job.error.action else "see `psctl describe`"
        action = action.replace("`psctl describe`", f"`psctl describe {job.job_id}`")
        frame = last_frame(job.traceback)
        details |= {"frame": frame} if frame else {}
        return errors.JobFailedError(f"{job.job_id} failed at step {job.step}: {why}", action=action, details=details)
    if job.state == "STOPPED":
        return errors.JobStoppedError(
            f"{job.job_id} was stopped at step {job.step}",
            action=f"`psctl resume {job.job_id}` continues from its newest snapshot",
            details=details,
        )
    return None


def last_frame(traceback: str) -> str:
    """The last frame of a job's traceback in the user's own files, as "task.py:16 in loss"; empty when there is none.

    A job's traceback begins with the user's first frame: files in that file's directory are the user's. Of chained
    errors the last one counts."""
    *_, last = traceback.rpartition("Traceback (most recent call last):")
    frames = list(_FRAME.finditer(last))
    if not frames:
        return ""
    directory = PurePath(frames[0]["file"]).parent
    own = [frame for frame in frames if PurePath(frame["file"]).is_relative_to(directory)]
    file = PurePath(own[-1]["file"]).relative_to(directory)
    name = own[-1]["name"]
    return f"{file}:{own[-1]['line']}" + (f" in {name}" if name else "")


def wait_drained(
    nodes: Callable[[], Sequence[Node]],
    asked: Node,
    timeout_s: float | None = None,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Node]:
    """What `Cluster.drained` does, of the list that `nodes` returns.

    The master lists every node on which a job has a placement: one that it does not list holds nothing, and is shown as
    a drained node that has left. An unreachable master is waited for, up to ten minutes."""
    deadline = math.inf if timeout_s is None else monotonic() + timeout_s
    shown = asked
    answered_s = monotonic()
    yield shown
    while shown.drain != DRAINED:
        if shown.drain is None:
            raise errors.StateError(
                f"node {shown.node_id} is no longer being drained", action="somebody has undone the drain"
            )
        if monotonic() >= deadline:
            why = "; ".join(shown.waits_for)
            raise errors.WaitTimeoutError(
                f"{shown.node_id} is not drained within {timeout_s:g} s" + (f": {why}" if why else ""),
                action=f"the drain continues; `psctl drain {shown.node_id} --undo` ends it",
            )
        sleep(POLL_S)
        try:
            found = next((node for node in nodes() if node.node_id == shown.node_id), None)
            answered_s = monotonic()
        except errors.UnreachableError:
            if monotonic() - answered_s >= MAX_OUTAGE_S or monotonic() >= deadline:
                raise
            continue
        found = found or replace(shown, drain=DRAINED, waits_for=(), processes=(), ready=False, incarnation="")
        if _shown_fields(found) != _shown_fields(shown):
            shown = found
            yield shown


def _shown_fields(node: Node) -> tuple[object, ...]:
    return node.drain, node.waits_for, node.processes
