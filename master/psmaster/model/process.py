"""What the master knows of processes: facts that agents reported, kept in memory only.

A restarted master learns them again from the agents' first messages. Losses are judged here, purely.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pscluster.errors import OutOfMemoryError, ProcessLostError
from psmaster.model.job import ErrorInfo, Job, PreflightCheck
from psmaster.model.plan import Placement, ProcessKind
from psmaster.model.speed import UNKNOWN, MeasuredSpeed

if TYPE_CHECKING:
    from psmaster.scheduling.draft import View


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerFacts:
    """A trainer that loaded, built and checked."""

    layout_json: bytes
    layout_sha256: str
    data_fingerprint: str
    numerics_class: str
    numerics_detail: str = ""
    num_samples: int = 0
    checks: tuple[PreflightCheck, ...] = ()
    device: str = "cpu"
    final_step: int = 0

    def seated(self, placement: Placement) -> Placement:
        """Its placement, counted on from now on."""
        return replace(placement, active=True, failed_on=(), device=self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionFacts:
    """A partition that listens."""

    addresses: tuple[str, ...]
    numerics_class: str
    numerics_detail: str = ""

    def seated(self, placement: Placement) -> Placement:
        """Its placement, counted on from now on."""
        return replace(placement, active=True, failed_on=(), addresses=self.addresses)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """How a process ended."""

    exit_code: int = 0
    signal: int = 0
    out_of_memory: bool = False
    error: ErrorInfo | None = None
    expected: bool = False  # its agent ended it, for instance because it was itself told to end


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a process said it cannot go on."""

    error: ErrorInfo
    traceback: str = ""
    step: int = 0
    checks: tuple[PreflightCheck, ...] = ()

    @property
    def terminal(self) -> bool:
        """Whether another attempt would meet the same: the request or the user's code is at fault."""
        return self.error.code.startswith(("PS-1", "PS-2"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreached:
    """The partitions that a process cannot connect to where the plan of `generation` says that they are; told first at
    `since_s` on the monotonic clock."""

    generation: int = 0
    partitions: frozenset[int] = frozenset()
    since_s: float = 0.0


REACHES_ALL = Unreached()


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One process as its agent reported it. `suspicion`: empty, "silent" or "stalled", since `suspect_since_s` on the
    monotonic clock."""

    process_id: str
    node_id: str
    trainer: TrainerFacts | None = None
    partition: PartitionFacts | None = None
    exit: Exit | None = None
    failure: Failure | None = None
    suspicion: str = ""
    suspect_since_s: float = 0.0
    unreached: Unreached = REACHES_ALL
    pace: MeasuredSpeed = UNKNOWN  # of a trainer

    @property
    def living(self) -> bool:
        return self.exit is None and self.failure is None


Processes = Mapping[str, Process]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A placement's process is gone. `counted`: it speaks against the job and is bounded; the loss of a node does
    not."""

    cause: str  # "exit", "signal", "memory", "failure", "silence", "node", "reach"
    message: str
    problem: ErrorInfo
    counted: bool


def failure_of(placement: Placement, job: Job, processes: Processes) -> Failure | None:
    """The terminal failure of a placement's process: what it reported, or what its agent could not start it for."""
    process = processes.get(placement.process_id(job.job_id)) if placement.placed else None
    if process is None:
        return None
    if process.failure is not None:
        return process.failure if process.failure.terminal else None
    if process.exit is not None and process.exit.error is not None:
        failure = Failure(error=process.exit.error)
        return failure if failure.terminal else None
    return None


def loss_of(placement: Placement, job: Job, view: View) -> Loss | None:
    """How the process in `placement` was lost; None while nothing says that it was."""
    if not placement.placed:
        return None
    process = view.processes.get(placement.process_id(job.job_id))
    if process is not None and process.failure is not None:
        return _lost(placement, "failure", f"reported {process.failure.error}", process.failure.error)
    if process is not None and process.exit is not None:
        return _ended(placement, process.exit, job)
    if process is not None and process.suspicion and (silence := _silence(placement, process, job, view)):
        return silence
    node = view.nodes.get(placement.node_id)
    if node is None:
        return _gone(placement, f"is lost: node {placement.node_id} has left")
    if not node.alive:
        return _gone(placement, f"is lost: node {placement.node_id} is silent")
    if node.incarnation != placement.incarnation:
        return _gone(placement, f"is lost: the daemon of {placement.node_id} was restarted")
    return None


def out_of_reach(placement: Placement, told: str) -> Loss:
    """The loss of a partition that lives where others cannot reach it; `told`: who cannot."""
    message = f"{placement.title} on {placement.node_id} is out of reach: {told}"
    return Loss(cause="reach", message=message, problem=_unexplained(message), counted=False)


def _silence(placement: Placement, process: Process, job: Job, view: View) -> Loss | None:
    """A partition that no longer beats holds up everybody and is replaced at once. Of a trainer others do the work
    meanwhile: it has time to come back. When all of them are at one microbatch for long, something that they share may
    be slow, and ending them would not help."""
    if placement.kind is ProcessKind.TRAINER:
        is_stalled = process.suspicion == "stalled"
        is_first = is_stalled and not process.pace.is_known
        grace_s = view.limits.first_grace_s if is_first else view.limits.trainer_grace_s
        if view.now.mono_s - process.suspect_since_s < grace_s:
            return None
        others = any(own.active and not own.suspect for own in job.trainers)
        if is_stalled and not others:
            return None
    return _lost(placement, "silence", "lives, but no longer beats or gets on", None)


def _ended(placement: Placement, exit_: Exit, job: Job) -> Loss | None:
    if exit_.expected:
        return _gone(placement, f"is lost: the agent on {placement.node_id} ended it")
    if exit_.out_of_memory:
        problem = exit_.error or ErrorInfo(
            code=OutOfMemoryError.code,
            cause=f"{placement.name} on {placement.node_id} ran out of memory",
            action=OutOfMemoryError.default_action,
        )
        return _lost(placement, "memory", "ran out of memory", problem)
    if exit_.signal:
        return _lost(
            placement, "signal", f"was ended by signal {exit_.signal} ({_signal_name(exit_.signal)})", exit_.error
        )
    if job.finished is not None and exit_.exit_code == 0:
        return None  # it has done its work
    if exit_.error is not None and exit_.error.code != ProcessLostError.code:  # its agent's error, not its end
        return _lost(placement, "exit", f"could not be started: {exit_.error}", exit_.error)
    return _lost(placement, "exit", f"ended with exit code {exit_.exit_code}", exit_.error)


def _lost(placement: Placement, cause: str, what: str, problem: ErrorInfo | None) -> Loss:
    message = f"{placement.title} on {placement.node_id} {what}"
    return Loss(cause=cause, message=message, problem=problem or _unexplained(message), counted=True)


def _gone(placement: Placement, what: str) -> Loss:
    message = f"{placement.title} {what}"
    return Loss(cause="node", message=message, problem=_unexplained(message), counted=False)


def _unexplained(message: str) -> ErrorInfo:
    return ErrorInfo(code=ProcessLostError.code, cause=message, action="see `psctl logs` for its last words")


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return "unknown"


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
