"""What a client can wait for, and whether a job has got there. Pure."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from pscluster.client.records import Job, Node
from pscluster.errors import (
    JobFailedError,
    JobStoppedError,
    PsError,
    SettingsError,
    StateError,
    UnreachableError,
    WaitTimeoutError,
)

_STATES = ("running", "succeeded", "failed", "stopped", "ended")
_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+)(?:, in (?P<name>.+))?$', re.MULTILINE)
DRAINED = "drained"
POLL_S = 0.25
PATIENCE_S = 600.0


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


def last_frame(traceback: str) -> str:
    """The last frame in the user's own files, as "task.py:16 in loss"; empty when there is none.

    A job's traceback begins with the user's first frame: what lies in that file's directory is the user's. Of chained
    errors the last one counts, which is the one that was raised in the end."""
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
    """`asked`, which the master returned when it was asked for the drain, and then the node whenever what it tells has
    changed, until it is drained; the last one is.

    The master lists every node on which a job has a placement: one that it does not list holds nothing. A master that
    is away is waited for, up to ten minutes. Raises WaitTimeoutError, StateError, PsError of `nodes`."""
    deadline = math.inf if timeout_s is None else monotonic() + timeout_s
    shown = asked
    last_heard = monotonic()
    yield shown
    while shown.drain != DRAINED:
        if shown.drain is None:
            raise StateError(f"node {shown.node_id} is not being drained any more", action="somebody has undone it")
        if monotonic() >= deadline:
            why = "; ".join(shown.waits_for)
            raise WaitTimeoutError(
                f"{shown.node_id} is not drained within {timeout_s:g} s" + (f": {why}" if why else ""),
                action=f"it still drains; `psctl drain {shown.node_id} --undo` ends that",
            )
        sleep(POLL_S)
        try:
            found = next((node for node in nodes() if node.node_id == shown.node_id), None) or _left(shown)
            last_heard = monotonic()
        except UnreachableError:
            if monotonic() - last_heard >= PATIENCE_S or monotonic() >= deadline:
                raise
            continue
        if _told(found) != _told(shown):
            shown = found
            yield shown


def _left(node: Node) -> Node:
    """The node once it is not listed any more, as the master itself tells of a drained one that is away."""
    return replace(node, drain=DRAINED, waits_for=(), processes=(), ready=False, incarnation="")


def _told(node: Node) -> tuple[object, ...]:
    return node.drain, node.waits_for, node.processes
