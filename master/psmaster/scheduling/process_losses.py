"""How processes are lost: they end, go silent, or cannot be reached on the data plane although the master can. Pure.

The plan leaves out a trainer that cannot reach a partition which others reach, until it can. A partition that no
trainer can reach is replaced, if there is room for it elsewhere. Where nothing tells which side is at fault (nobody
reaches anybody), or there is no room, the job waits, and its processes keep trying."""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pscluster.errors import OutOfMemoryError, ProcessLostError
from pscluster.wire.backoff import delay_s
from psmaster.model.job import ErrorInfo, Instant, Job
from psmaster.model.plan import Placement, Plan, ProcessKind
from psmaster.model.process import Exit, Process, Processes
from psmaster.scheduling.draft import View

REPORT_GRACE_S = 1.0  # how old a report on a connection must be to count: others may be about to report the same
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessLoss:
    """A placement's process is gone. `counted`: it counts against the limit on losses; the loss of a node does not.
    `elsewhere`: its replacement is to run on another node."""

    message: str
    error: ErrorInfo
    counted: bool
    elsewhere: bool = False


def loss_of(placement: Placement, job: Job, view: View) -> ProcessLoss | None:
    """How the process in `placement` was lost; None while nothing says that it was."""
    if not placement.placed:
        return None
    process = view.processes.get(placement.process_id(job.job_id))
    here = f"on {placement.node_id}"
    if process is not None and process.failure is not None:
        return _lost(placement, f"{here} reported {process.failure.error}", process.failure.error)
    if process is not None and process.exit is not None:
        return _ended(placement, process.exit, job)
    if process is not None and process.suspicion and _is_given_up(placement, process, job, view):
        return _lost(placement, f"{here} is alive, but sends no heartbeats or makes no progress")
    node = view.nodes.get(placement.node_id)
    if node is not None and node.alive and node.incarnation == placement.incarnation:
        return None
    if node is None:
        what = f"node {placement.node_id} has left"
    elif not node.alive:
        what = f"node {placement.node_id} is silent"
    else:
        what = f"the daemon of {placement.node_id} was restarted"
    return _lost(placement, f"is lost: {what}", counted=False)


def out_of_reach(placement: Placement, reports: str) -> ProcessLoss:
    """The loss of a partition that lives where others cannot reach it; `reports` says who cannot."""
    lost = _lost(placement, f"on {placement.node_id} is out of reach: {reports}", counted=False)
    return replace(lost, elsewhere=True)


def _is_given_up(placement: Placement, process: Process, job: Job, view: View) -> bool:
    """A partition without heartbeats blocks every step and is replaced at once. A trainer has a grace period: others
    compute its shards. When all trainers are stalled, what they share may be slow, and ending them would not help."""
    if placement.kind is ProcessKind.PARTITION:
        return True
    is_stalled = process.suspicion == "stalled"
    is_first = is_stalled and not process.speed.is_known
    grace_s = view.limits.first_grace_s if is_first else view.limits.trainer_grace_s
    others = any(own.active and not own.suspect for own in job.trainers)
    return view.now.mono_s - process.suspect_since_s >= grace_s and (others or not is_stalled)


def _ended(placement: Placement, exit_: Exit, job: Job) -> ProcessLoss | None:
    here, error = f"on {placement.node_id}", exit_.error
    if exit_.expected:
        return _lost(placement, f"is lost: the agent {here} ended it", counted=False)
    if exit_.out_of_memory:
        error = error or ErrorInfo.of(OutOfMemoryError(f"{placement.name} {here} ran out of memory"))
        return _lost(placement, f"{here} ran out of memory", error)
    if exit_.signal:
        what = f"{here} was ended by signal {exit_.signal} ({_signal_name(exit_.signal)})"
        return _lost(placement, what, error)
    if job.finished is not None and exit_.exit_code == 0:
        return None  # it has done its work
    if error is not None and error.code != ProcessLostError.code:  # it is the agent's error
        return _lost(placement, f"{here} could not be started: {error}", error)
    return _lost(placement, f"{here} ended with exit code {exit_.exit_code}", error)


def _lost(placement: Placement, what: str, error: ErrorInfo | None = None, *, counted: bool = True) -> ProcessLoss:
    message = f"{placement.title} {what}"
    unexplained = ProcessLostError(message, action="see the end of `psctl logs`")
    return ProcessLoss(message=message, error=error or ErrorInfo.of(unexplained), counted=counted)


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkCut:
    """`reports`: the partitions that each process cannot reach, by the name of its placement. `trainers`: ranks to do
    without. `partitions`: indices to replace."""

    reports: Mapping[str, frozenset[int]]
    trainers: frozenset[int] = frozenset()
    partitions: frozenset[int] = frozenset()


NO_CUT = NetworkCut(reports={})


def find_cut(job: Job, processes: Processes, now: Instant) -> NetworkCut:
    """Which trainers and partitions to do without, given the connections that cannot be made."""
    plan, is_reported = job.plan, any(process.unreached.partitions for process in processes.values())
    if not is_reported or plan is None or job.finished is not None:
        return NO_CUT
    if not all(placement.active and plan.holds(placement) for placement in job.partitions):
        return NO_CUT  # one is away, or not in the plan yet: it cannot be reached
    held = {placement: processes.get(placement.process_id(job.job_id)) for placement in job.working}
    trainers = {  # that of a silent one may be out of date
        placement: _unreached(process, plan)
        for placement in job.trainers
        if placement.active and (process := held[placement]) is not None and process.suspicion != "silent"
    }
    voters = {placement: _unreached(held[placement], plan) for placement in job.partitions if placement.rank}
    reports = {placement.name: missing for placement, missing in (trainers | voters).items() if missing}
    if not reports:
        return NO_CUT
    ripe = {
        own for own, process in held.items() if process and now.mono_s - process.unreached.since_s >= REPORT_GRACE_S
    }
    lost = _lost_to_trainers(trainers, ripe, len(job.partitions)) | _lost_to_voters(voters, ripe)
    cut_off = frozenset(
        placement.rank for placement, missing in trainers.items() if placement in ripe and missing - lost
    )
    return NetworkCut(reports=reports, trainers=cut_off, partitions=lost)


def describe_reports(reports: Mapping[str, frozenset[int]]) -> str:
    """The reports in one line; empty when there are none."""
    shown = [f"{name} {cannot_reach(missing)}" for name, missing in sorted(reports.items())[:4]]
    return "; ".join(shown) + ("; ..." if len(reports) > 4 else "")


def cannot_reach(missing: frozenset[int]) -> str:
    return "cannot reach " + ", ".join(f"partition-{index}" for index in sorted(missing))


def _unreached(process: Process | None, plan: Plan) -> frozenset[int]:
    """The partitions that it cannot reach at their present addresses. A restore and a takeover change these and
    void older reports."""
    if process is None or process.unreached.generation < max(plan.restore_generation, plan.moved_generation):
        return frozenset()
    return process.unreached.partitions


def _lost_to_trainers(
    trainers: Mapping[Placement, frozenset[int]], ripe: set[Placement], num_partitions: int
) -> frozenset[int]:
    """The partitions that no trainer reaches. None when that is all of them, since the trainers' network may be at
    fault; of the only partition, several trainers must report it."""
    if not trainers or not any(placement in ripe for placement in trainers):
        return frozenset()
    by_all = frozenset.intersection(*trainers.values())
    if len(by_all) == num_partitions and not (num_partitions == 1 and len(trainers) > 1):
        return frozenset()
    return by_all


def _lost_to_voters(voters: Mapping[Placement, frozenset[int]], ripe: set[Placement]) -> frozenset[int]:
    """The partitions that cannot reach the coordinator and so cannot vote; the coordinator when no other reaches it."""
    cut_off = frozenset(placement.rank for placement, missing in voters.items() if missing and placement in ripe)
    if len(voters) > 1 and len(cut_off) == len(voters):
        return frozenset({0})
    return cut_off


def retry_delay_s(losses: int) -> float:
    """How long the process after the `losses`th loss (from 1) waits; five waits together are 15.5 s."""
    return delay_s(losses, 0.0, first_s=FIRST_RETRY_S, cap_s=MAX_RETRY_S, jitter=0.0)
