"""A job as an immutable value, and its transitions. Pure.

    QUEUED -> STARTING -> RUNNING -> SUCCEEDED
       ^         |           |-----> FAILED  --+
       |         |           `-----> STOPPED --+-- resume --> QUEUED
       `---------+ (stop, failure: as from RUNNING)

A transition takes a job and the time, and returns the changed job with an event."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from pscluster.errors import InternalError, PsError, StateError
from pscluster.job.spec import JobSpec
from psmaster.model.audits import NO_AUDITS, Audits
from psmaster.model.plan import Placement, Plan, ProcessKind

LOCAL_OWNER = "local"  # who submits over a Unix socket; older versions knew no other
MAX_EVENTS = 200  # how many events of a job are remembered, the newest


@dataclass(frozen=True, kw_only=True, slots=True)
class Instant:
    """One moment on both clocks: `mono_s` for durations and leases, `unix_s` for people and files."""

    mono_s: float
    unix_s: float


class JobState(StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED)

    @property
    def live(self) -> bool:
        """Whether the job holds placements."""
        return self in (JobState.STARTING, JobState.RUNNING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to a job. `subject` (a kind of process) and `seconds` are for the metrics."""

    time_s: float
    reason: str
    message: str
    warning: bool = False
    subject: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """The last state of one aspect of a job; `since_s` is the Unix time of its last change of status."""

    type: str
    status: bool
    reason: str
    message: str
    since_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorInfo:
    """A named error as data; see pscluster.errors."""

    code: str
    cause: str
    action: str = ""
    details: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, error: PsError) -> ErrorInfo:
        return cls(
            code=error.code, cause=error.cause, action=error.action, details=tuple(sorted(error.details.items()))
        )

    def __str__(self) -> str:
        return f"{self.code}: {self.cause}" + (f" ({self.action})" if self.action else "")

    def detail(self, key: str) -> str:
        """The value under `key`, or an empty string."""
        return dict(self.details).get(key, "")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightCheck:
    """One preflight check on one node. `warning`: it passed, and what was seen must be read."""

    name: str
    ok: bool
    detail: str
    node_id: str = ""
    warning: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    step: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Training has ended under `generation`, as the coordinator reported."""

    generation: int
    step: int
    stopped: bool
    parameters_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JobWarning:
    """Something that went wrong and that training survived, with the step it concerns."""

    step: int
    error: ErrorInfo

    @property
    def is_unwritten(self) -> bool:
        """Whether it is a part of the step's snapshot that could not be written."""
        return bool(self.error.detail("unwritten"))

    @property
    def generation(self) -> int:
        """The generation under which that part was to be written; 0 when it is missing or malformed."""
        text = self.error.detail("generation")
        return int(text) if text.isdecimal() and len(text) < 20 else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditMismatch:
    """The coordinator found that two trainers differ, and does not commit the step. `node_id`: the node to leave out;
    empty: the job fails."""

    generation: int
    step: int
    node_id: str
    error: ErrorInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConnection:
    trainer: int
    partition: int
    transport: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One committed step. `grad_norm` is NaN when it was skipped."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    weight: float
    samples: float
    skipped: bool
    time_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """A loss after which no step was committed yet. `generation`: of the plan that recovers from it; 0: none yet."""

    kind: ProcessKind
    since_s: float  # monotonic
    generation: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceState:
    """When shards were assigned last (`since_s` is monotonic, `step` was committed then), and what
    `scheduling.rebalance` remembers. `moves`: made for speed, one soon after the other, the last at `moved_s`. `probe`:
    the rank that has a shard to be measured again (-1: none); `tried`: how often that was in vain, by rank."""

    since_s: float
    step: int
    moves: int = 0
    moved_s: float = -math.inf
    probe: int = -1
    tried: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run. Fields under "volatile" are not stored: a restarted master measures them anew."""

    job_id: str
    name: str
    spec: JobSpec
    created_s: float
    request_id: str = ""
    bundle_sha256: str = ""
    data_token: bytes = field(default=b"", repr=False)
    owner: str = LOCAL_OWNER
    store: str = ""
    directory: str = ""
    state: JobState = JobState.QUEUED
    reason: str = ""
    started_s: float = 0.0
    ended_s: float = 0.0
    stopping: bool = False
    trainers: tuple[Placement, ...] = ()
    partitions: tuple[Placement, ...] = ()
    standbys: tuple[Placement, ...] = ()
    attempts: tuple[tuple[str, int], ...] = ()  # the highest attempt ever of each placement, by its name
    excluded: tuple[tuple[str, str, str], ...] = ()  # (node, its incarnation, why) left out of this job
    generation: int = 0
    plan: Plan | None = None
    layout_json: bytes = field(default=b"", repr=False)
    layout_sha256: str = ""
    data_fingerprint: str = ""
    microbatch_digest: str = ""  # of the first microbatch, as its first trainer computed it
    numerics_mode: str = ""
    numerics_class: str = ""
    optimizer_class: str = ""
    numerics: str = ""
    final_step: int = 0
    step: int = 0
    high_step: int = 0
    loss: float = math.nan
    grad_norm: float = math.nan
    nonfinite: int = 0
    metrics: tuple[tuple[str, float], ...] = ()
    metrics_step: int = 0
    best: Best | None = None
    next_best: Best | None = None  # reported, but its snapshot is not complete yet
    finished: Finished | None = None
    crashes: tuple[tuple[str, int, int], ...] = ()  # (activity, version, shard) of fatal signals in trainers
    snapshot_warning: JobWarning | None = None  # the newest part that could not be written, and still counts
    error: ErrorInfo | None = None
    traceback: str = ""
    saving: bool = False  # a partition is about to move: the job pauses at the next step and writes it
    held: int = -1  # the step at which it pauses for that; -1: it does not
    audits: Audits = NO_AUDITS
    mismatch: AuditMismatch | None = None  # reported, and nothing follows from it yet
    going_back: bool = False  # the next plan restores, although no partition was lost
    parameters_sha256: str = ""
    checks: tuple[PreflightCheck, ...] = ()
    connections: tuple[DataConnection, ...] = ()
    conditions: tuple[Condition, ...] = ()
    revision: int = 0
    # volatile
    deadline_s: float | None = None  # monotonic: when a wait in progress (stop, finish, failures) is over
    window: tuple[StepRecord, ...] = ()  # the newest steps, over which rates are measured
    recovery: Recovery | None = None
    assignment: RebalanceState | None = None
    held_s: float | None = None  # monotonic: since when it pauses at `held`, or paused in vain

    @property
    def num_shards(self) -> int:
        return self.spec.train.num_shards

    @property
    def placements(self) -> tuple[Placement, ...]:
        return self.trainers + self.partitions + self.standbys

    @property
    def working(self) -> tuple[Placement, ...]:
        """The placements without which there is no step."""
        return self.trainers + self.partitions

    @property
    def restore_generation(self) -> int:
        return self.plan.restore_generation if self.plan else 0

    def placement(self, kind: ProcessKind, rank: int) -> Placement | None:
        """The placement of that kind and rank, if the job has it now; no standby's."""
        placements = self.trainers if kind is ProcessKind.TRAINER else self.partitions
        return next((placement for placement in placements if placement.rank == rank), None)

    def standby(self, rank: int) -> Placement | None:
        """The placement of the standby of partition `rank`, if the job has it now."""
        return next((placement for placement in self.standbys if placement.rank == rank), None)

    @property
    def pinned(self) -> frozenset[int]:
        """The steps whose snapshots are kept as the best, reported or complete."""
        return frozenset(best.step for best in (self.best, self.next_best) if best is not None)

    def counts(self, generation: int) -> bool:
        """Whether a report made under `generation` still counts: it is not older than the newest restore."""
        return self.plan is not None and self.plan.restore_generation <= generation <= self.generation


VOLATILE = frozenset({"deadline_s", "window", "recovery", "assignment", "held_s"})


_ALLOWED: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.STOPPED, JobState.FAILED}),
    JobState.STARTING: frozenset({JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.STOPPED: frozenset({JobState.QUEUED}),
}


# What a job has only while it is live; what its last run left; what binds it to the model and data of its snapshots.
_WHILE_LIVE = """trainers partitions standbys excluded stopping deadline_s recovery assignment saving held held_s
    window mismatch going_back"""
_OF_LAST_RUN = "ended_s crashes plan finished snapshot_warning error traceback parameters_sha256 checks connections"
_OF_SNAPSHOTS = """layout_json layout_sha256 data_fingerprint microbatch_digest numerics_mode numerics_class
    optimizer_class numerics"""


def _defaults(names: str) -> dict[str, Any]:
    """These fields of a job, each with its default."""
    defaults = {own.name: own.default for own in fields(Job)}
    return {name: defaults[name] for name in names.split()}


def enter_state(job: Job, state: JobState, reason: str) -> Job:
    """The job in `state`. Raises InternalError for a transition that the state machine does not have."""
    if state not in _ALLOWED[job.state]:
        raise InternalError(f"job {job.job_id} cannot go from {job.state} to {state}")
    return replace(job, state=state, reason=reason)


def end_job(job: Job, state: JobState, reason: str, now: Instant, *, warning: bool = False) -> tuple[Job, Event]:
    """The job ended as `state`, with all placements released and all waits cancelled."""
    ended = replace(enter_state(job, state, reason), ended_s=now.unix_s, **_defaults(_WHILE_LIVE))
    event = Event(time_s=now.unix_s, reason=state.value.capitalize(), message=reason, warning=warning)
    return ended, event


def fail_job(job: Job, error: ErrorInfo, now: Instant, traceback: str = "") -> tuple[Job, Event]:
    """The job ended FAILED for `error`."""
    named = replace(job, error=error, traceback=traceback)
    return end_job(named, JobState.FAILED, str(error), now, warning=True)


def request_stop(job: Job, now: Instant) -> tuple[Job, Event | None]:
    """The job asked to stop. Repeating it changes nothing. Raises StateError when it has ended otherwise."""
    if job.state is JobState.STOPPED or job.stopping:
        return job, None
    if job.state.ended:
        raise StateError(f"job {job.job_id} has ended as {job.state}", action="only a live job can be stopped")
    event = Event(time_s=now.unix_s, reason="StopRequested", message="asked to stop at the next step boundary")
    return replace(job, stopping=True), event


def resume_job(job: Job, has_snapshot: bool, now: Instant) -> tuple[Job, Event | None]:
    """The stopped or failed job queued again. Repeating it on a live job changes nothing. Without a snapshot nothing
    binds it to the model and data it saw before. Raises StateError when it succeeded, or is about to stop."""
    if job.state is JobState.SUCCEEDED or job.stopping:
        what = "is stopping" if job.stopping else "has reached its last step"
        raise StateError(f"job {job.job_id} {what}", action="only a stopped or failed job can be resumed")
    if not job.state.ended:
        return job, None
    forgotten = _defaults(_OF_LAST_RUN if has_snapshot else f"{_OF_LAST_RUN} {_OF_SNAPSHOTS}")
    queued = replace(enter_state(job, JobState.QUEUED, "waits for its turn"), **forgotten)
    return queued, Event(time_s=now.unix_s, reason="Resumed", message="queued again")
