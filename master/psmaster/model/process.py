"""What agents reported about processes, kept in memory only: a restarted master gets it again from the agents. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from psmaster.model.job import ErrorInfo, Job, PreflightCheck
from psmaster.model.plan import Placement, ProcessKind

SMOOTHING = 0.1  # weight of a new measurement once there are a few
APART = 0.2  # a measurement that differs by more than this may be a change rather than noise ...
NUM_APART = 3  # ... and is, when so many in a row differ to the same side
FORGET_S = 10.0  # after so long without a measurement the next one begins afresh
FORGET_MICROBATCHES = 5  # but not before so many microbatches could have been computed


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSpeed:
    """`microbatch_s`: seconds that one microbatch takes, waiting left out; 0 before the first measurement.

    `microbatches`: how many the trainer had measured by then. `measurements`: of which this is made, since it began
    afresh. `apart`: the newest ones, while they differ to one side. `measured_at_s`: monotonic time of the last."""

    microbatch_s: float = 0.0
    microbatches: int = 0
    measurements: int = 0
    apart: tuple[float, ...] = ()
    measured_at_s: float = -math.inf

    @property
    def is_known(self) -> bool:
        return self.measurements > 0


UNKNOWN_SPEED = MeasuredSpeed()


def with_measurement(speed: MeasuredSpeed, microbatch_s: float, microbatches: int, now_s: float) -> MeasuredSpeed:
    """The speed after a measurement. An invalid one (no positive number) and a repeated one (a count of `microbatches`
    that does not rise) change nothing."""
    if not (math.isfinite(microbatch_s) and microbatch_s > 0) or microbatches <= speed.microbatches:
        return speed
    fresh = replace(speed, microbatches=microbatches, measured_at_s=now_s)
    silence_s = now_s - speed.measured_at_s
    if not speed.is_known or silence_s > max(FORGET_S, FORGET_MICROBATCHES * speed.microbatch_s):
        return replace(fresh, microbatch_s=microbatch_s, measurements=1, apart=())
    apart = _apart(speed, microbatch_s)
    if len(apart) >= NUM_APART:
        return replace(fresh, microbatch_s=statistics.median(apart), measurements=len(apart), apart=())
    weight = max(SMOOTHING, 1 / (speed.measurements + 1))
    smooth_s = speed.microbatch_s + weight * (microbatch_s - speed.microbatch_s)
    return replace(fresh, microbatch_s=smooth_s, measurements=speed.measurements + 1, apart=apart)


def _apart(speed: MeasuredSpeed, microbatch_s: float) -> tuple[float, ...]:
    """The measurements in a row, this one the last, that are far from the mean, all on one side of it."""
    ratio = microbatch_s / speed.microbatch_s
    if 1 / (1 + APART) <= ratio <= 1 + APART:
        return ()
    is_slower = ratio > 1
    same_side = tuple(s for s in speed.apart if (s > speed.microbatch_s) == is_slower)
    return (*(same_side if len(same_side) == len(speed.apart) else ()), microbatch_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerFacts:
    """A trainer that loaded, built and checked."""

    layout_json: bytes
    layout_sha256: str
    data_fingerprint: str
    numerics_class: str
    numerics_detail: str = ""
    checks: tuple[PreflightCheck, ...] = ()
    device: str = "cpu"
    final_step: int = 0
    microbatch_digest: str = ""

    def activate(self, placement: Placement) -> Placement:
        """`placement` as active, with what this process reported."""
        numerics = self.numerics_class
        return replace(placement, active=True, failed_on=(), device=self.device, numerics_class=numerics)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionFacts:
    """A partition that listens."""

    addresses: tuple[str, ...]
    numerics_class: str
    numerics_detail: str = ""

    def activate(self, placement: Placement) -> Placement:
        """`placement` as active, with what this process reported."""
        return replace(placement, active=True, failed_on=(), addresses=self.addresses)


@dataclass(frozen=True, kw_only=True, slots=True)
class LastPosition:
    """Where a trainer was when its process ended: see the message of this name."""

    activity: str = ""
    version: int = 0
    shard: int = -1
    call: str = ""
    traceback: str = ""

    @property
    def step(self) -> int:
        """The step that was being made, or the committed one that was evaluated; 0 before the first."""
        return self.version + (self.activity == "train")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """How a process ended. `position`: of a trainer that had loaded user code."""

    exit_code: int = 0
    signal: int = 0
    out_of_memory: bool = False
    error: ErrorInfo | None = None
    expected: bool = False  # its agent ended it, for instance because the agent itself was asked to end
    position: LastPosition | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a process cannot continue, as it reported, in which step, and which one was committed by then."""

    error: ErrorInfo
    traceback: str = ""
    step: int = 0
    checks: tuple[PreflightCheck, ...] = ()
    committed: int = 0

    @property
    def terminal(self) -> bool:
        """Whether another attempt would meet the same: the request or the user's code is at fault."""
        return self.error.code.startswith(("PS-1", "PS-2"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreached:
    """The partitions that a process cannot connect to at the addresses in the plan of `generation`."""

    generation: int = 0
    partitions: frozenset[int] = frozenset()
    since_s: float = 0.0  # monotonic: when it was first reported


REACHES_ALL = Unreached()


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One process as its agent reported it. `suspicion`: empty, "silent" or "stalled"."""

    process_id: str
    node_id: str
    trainer: TrainerFacts | None = None
    partition: PartitionFacts | None = None
    exit: Exit | None = None
    failure: Failure | None = None
    suspicion: str = ""
    suspect_since_s: float = 0.0  # monotonic
    unreached: Unreached = REACHES_ALL
    speed: MeasuredSpeed = UNKNOWN_SPEED  # of a trainer

    @property
    def living(self) -> bool:
        return self.exit is None and self.failure is None


Processes = Mapping[str, Process]


def failure_of(placement: Placement, job: Job, processes: Processes) -> Failure | None:
    """The terminal failure of a placement's process: what it reported, or what its agent could not start it for."""
    process = processes.get(placement.process_id(job.job_id)) if placement.placed else None
    if process is None:
        return None
    if process.failure is not None:
        return process.failure if process.failure.terminal else None
    if process.exit is not None and process.exit.error is not None:
        failure = exit_failure(process.exit.error, process.exit.position)
        return failure if failure.terminal else None
    return None


def exit_failure(error: ErrorInfo, position: LastPosition | None) -> Failure:
    """The failure of a process that ended without a report of its own."""
    if position is None:
        return Failure(error=error)
    details = dict(error.details) | ({"shard": str(position.shard)} if position.shard >= 0 else {})
    return Failure(
        error=replace(error, details=tuple(sorted(details.items()))),
        traceback=position.traceback,
        step=position.step,
        committed=position.version,
    )


def with_place(placement: Placement, failure: Failure, placements: Sequence[Placement]) -> ErrorInfo:
    """The error of a failure, with where it happened. `placements`: all that failed."""
    where = ", ".join(f"{other.name} on {other.node_id}" for other in placements)
    step = f", step {failure.step}" if failure.step else ""
    details = {**dict(failure.error.details), "process": placement.name, "node": placement.node_id}
    if failure.step:
        details["step"] = str(failure.step)
    cause = f"{failure.error.cause} ({where}{step})"
    return replace(failure.error, cause=cause, details=tuple(sorted(details.items())))


def ready_facts(placement: Placement, job: Job, processes: Processes) -> TrainerFacts | PartitionFacts | None:
    """What the living process in `placement` reported as ready; None before that."""
    process = processes.get(placement.process_id(job.job_id)) if placement.placed else None
    if process is None or not process.living:
        return None
    return process.trainer if placement.kind is ProcessKind.TRAINER else process.partition


def was_ready(placement: Placement, job: Job, processes: Processes) -> bool:
    """Whether the process in `placement` ever reported that it is ready, whatever became of it."""
    process = processes.get(placement.process_id(job.job_id))
    return placement.active or (process is not None and (process.trainer or process.partition) is not None)
