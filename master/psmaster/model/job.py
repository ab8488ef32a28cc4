"""A job as a value: what is asked, where it is, who runs it, what is known of it. Immutable; see `transitions`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from pscluster.job.spec import JobSpec
from psmaster.model.plan import Placement, Plan, ProcessKind

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What happened to a job. For the metrics: `subject`, the kind of process that it is about, and `seconds`, how
    long what it tells of took."""

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

    def __str__(self) -> str:
        return f"{self.code}: {self.cause}" + (f" ({self.action})" if self.action else "")

    def detail(self, key: str) -> str:
        """The value under `key`, or an empty string."""
        return dict(self.details).get(key, "")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightCheck:
    """One preflight check on one node."""

    name: str
    ok: bool
    detail: str
    node_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    step: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The coordinator's word that training has ended; `generation` is the one it ended under."""

    generation: int
    step: int
    stopped: bool
    parameters_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JobWarning:
    """Something that went wrong and that training survived, with the step it concerns."""

    step: int
    problem: ErrorInfo

    @property
    def is_unwritten(self) -> bool:
        """Whether it is a part of the step's snapshot that could not be written."""
        return bool(self.problem.detail("unwritten"))

    @property
    def generation(self) -> int:
        """Under which that part was to be written; 0 when it was not said in a way that can be read."""
        told = self.problem.detail("generation")
        return int(told) if told.isdecimal() and len(told) < 20 else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConnection:
    trainer: int
    partition: int
    transport: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One committed step in the window that rates are measured over."""

    time_s: float
    step: int
    samples: float
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """A loss that no commit has made good yet. `since_s` is monotonic; `generation` mends it (0: none yet)."""

    kind: ProcessKind
    since_s: float
    generation: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Dealing:
    """When shards were dealt last, and what straggler relief remembers; see `relief`.

    `since_s` is monotonic, `step` what was committed then. `moves`: made for speed, one soon after the other, the last
    at `moved_s`. `probe`: the rank that has a shard to be measured again (-1: none); `tried`: how often that was in
    vain, by rank."""

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
    trouble: JobWarning | None = None  # the newest part of a snapshot that could not be written, and still counts
    error: ErrorInfo | None = None
    traceback: str = ""
    saving: bool = False  # a partition is about to move: the next step is to be written, and the job to rest there
    held: int = -1  # the step at which it rests for that; -1: it does not
    parameters_sha256: str = ""
    checks: tuple[PreflightCheck, ...] = ()
    connections: tuple[DataConnection, ...] = ()
    conditions: tuple[Condition, ...] = ()
    revision: int = 0
    # volatile
    deadline_s: float | None = None  # monotonic: when a wait in progress (stop, finish, failures) is over
    window: tuple[Point, ...] = ()
    recovery: Recovery | None = None
    dealing: Dealing | None = None
    held_s: float | None = None  # monotonic: since when it rests at `held`, or rested in vain

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


VOLATILE = frozenset({"deadline_s", "window", "recovery", "dealing", "held_s"})
