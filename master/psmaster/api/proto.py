"""The domain's values as protobuf messages and back. Nothing is decided here.

Fields correspond by name (see `pscluster.rpc.codec`); the tables below name the exceptions, and importing this module
fails when a field of one side is neither on the other side nor in its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pscluster.errors import CallerError, InternalError
from pscluster.rpc.codec import Codec, Wire
from pscluster.security.credentials import Credentials
from pscluster.v1 import agents_pb2, jobs_pb2, plan_pb2
from psmaster.api import probe_proto
from psmaster.control.agent_stream import Acknowledgement, Assignment, StreamMessage
from psmaster.control.transaction import Report
from psmaster.model import reports
from psmaster.model.audits import AuditRecord, Audits, VouchedNode
from psmaster.model.job import (
    VOLATILE,
    AuditMismatch,
    Best,
    Condition,
    DataConnection,
    ErrorInfo,
    Event,
    Finished,
    Instant,
    Job,
    JobWarning,
    PreflightCheck,
    StepRecord,
)
from psmaster.model.membership import Node
from psmaster.model.plan import Part, Placement, Plan, ProcessKind, RestorePoint, counted_on
from psmaster.model.probe import ProbeOrder
from psmaster.model.process import (
    REACHES_ALL,
    Exit,
    Failure,
    LastPosition,
    PartitionFacts,
    Process,
    Processes,
    TrainerFacts,
    Unreached,
)
from psmaster.model.reports import Connected, Evaluated, Progress, StandbyState
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.scheduling import rebalance
from psmaster.scheduling.reconcile import Desired

_wire = Wire()
_wire.pair(PreflightCheck, plan_pb2.PreflightCheck)
_wire.pair(DataConnection, plan_pb2.Connection)
_PART = _wire.pair(Part, plan_pb2.SnapshotPart)
_UNREACHED = _wire.pair(Unreached, plan_pb2.Unreached, only_value=["since_s"], only_message=["reasons"])
_ERROR = _wire.pair(ErrorInfo, plan_pb2.ErrorDetail)
_wire.adapt(
    ErrorInfo, plan_pb2.ErrorDetail, lambda m: _ERROR.decode(m, code=m.code or InternalError.code), _ERROR.encode
)

# What agents send

_wire.pair(StepRecord, plan_pb2.StepRecord)
_wire.pair(AuditRecord, plan_pb2.AuditRecord)
_REPORTS: Mapping[str, Codec[Any, Any]] = {
    "trainer_ready": _wire.pair(TrainerFacts, plan_pb2.TrainerReady, only_message=["num_samples"]),
    "partition_ready": _wire.pair(PartitionFacts, plan_pb2.PartitionReady),
    "progress": _wire.pair(Progress, plan_pb2.Progress, only_message=["connected_trainers"]),
    "evaluated": _wire.pair(Evaluated, plan_pb2.Evaluated),
    "snapshot_part": _PART,
    "finished": _wire.pair(Finished, plan_pb2.Finished),
    "failure": _wire.pair(Failure, plan_pb2.Failure),
    "warning": _wire.pair(JobWarning, plan_pb2.Warning),
    "connected": _wire.pair(Connected, plan_pb2.Connected),
    "standby_state": _wire.pair(StandbyState, plan_pb2.StandbyState),
    "audit_mismatch": _wire.pair(AuditMismatch, plan_pb2.AuditMismatch),
}
_IGNORED_REPORTS = frozenset({"counters", "beat", "plan_adopted"})  # the agent's, or of no use to the master
if _REPORTS.keys() | _IGNORED_REPORTS != {field.name for field in plan_pb2.ProcessReport.DESCRIPTOR.fields}:
    raise TypeError("the kinds of ProcessReport are not all accounted for")
_wire.pair(LastPosition, plan_pb2.LastPosition)
_EXIT = _wire.pair(
    Exit, agents_pb2.ProcessStatus, only_message=["process_id", "phase", "pid", "suspicion", "unreached"]
)
_SUSPICIONS = {
    agents_pb2.ProcessStatus.SUSPICION_SILENT: "silent",
    agents_pb2.ProcessStatus.SUSPICION_STALLED: "stalled",
}
_RESOURCES = {name: f"resources.{name}" for name in ("slots", "cpu_cores", "memory_bytes", "devices")}
_OF_THE_MASTER = ("former", "connected", "leaving", "seen_s")  # fields of a Node that are not on the wire
_REGISTRATION = _wire.pair(
    Node,
    agents_pb2.RegisterRequest,
    renamed=_RESOURCES,
    only_value=[*_OF_THE_MASTER, "last_beat_s"],
    only_message=["protocol"],
)


def node(m: agents_pb2.RegisterRequest) -> Node:
    """Raises CallerError for a request without id, incarnation or role."""
    if not m.node_id or not m.incarnation or m.role not in (agents_pb2.ROLE_WORKER, agents_pb2.ROLE_SERVER):
        raise CallerError("a node registers with an id, an incarnation and a role", action="see the daemon's flags")
    return _REGISTRATION.decode(m)


def processes(node_id: str, states: Sequence[agents_pb2.ProcessState]) -> tuple[Process, ...]:
    """Every process that a node's Hello names."""
    return tuple(_process(node_id, state) for state in states)


def _process(node_id: str, state: agents_pb2.ProcessState) -> Process:
    ready = report(state.ready)
    return Process(
        process_id=state.status.process_id,
        node_id=node_id,
        trainer=ready if isinstance(ready, TrainerFacts) else None,
        partition=ready if isinstance(ready, PartitionFacts) else None,
        exit=exit_of(state.status),
        suspicion=suspicion_of(state.status),
        unreached=unreached_of(state.status),
    )


def suspicion_of(m: agents_pb2.ProcessStatus) -> str:
    """How a running process looks to its agent: "silent", "stalled", or empty."""
    return _SUSPICIONS.get(m.suspicion, "") if m.phase == agents_pb2.ProcessStatus.PHASE_RUNNING else ""


def unreached_of(m: agents_pb2.ProcessStatus) -> Unreached:
    """The partitions that a running process cannot connect to."""
    return _UNREACHED.decode(m.unreached) if m.phase == agents_pb2.ProcessStatus.PHASE_RUNNING else REACHES_ALL


def exit_of(m: agents_pb2.ProcessStatus) -> Exit | None:
    """How the process ended; None while it runs."""
    return _EXIT.decode(m) if m.phase == agents_pb2.ProcessStatus.PHASE_EXITED else None


def speeds(m: agents_pb2.NodeBeat) -> Mapping[str, tuple[float, int]]:
    """What a node's trainers measured, by process id: seconds a microbatch, and how many were measured."""
    return {process_id: (speed.microbatch_s, speed.microbatches) for process_id, speed in m.speeds.items()}


def report(m: plan_pb2.ProcessReport) -> Report | None:
    """The report; None for a kind that the master ignores, or does not know yet."""
    kind = m.WhichOneof("body") or ""
    codec = _REPORTS.get(kind)
    return None if codec is None else codec.decode(getattr(m, kind))


# What agents receive

_wire.pair(RestorePoint, plan_pb2.RestorePoint)
_PROCESS_STATE = ("incarnation", "last_node_id", "losses", "failed_on", "not_before_s", "suspect", "kind")
_TRAINER = _wire.pair(
    Placement,
    plan_pb2.TrainerPlacement,
    only_value=[*_PROCESS_STATE, "addresses", "standby", "synced"],
    only_message=["microbatch_s"],
)
_PARTITION = _wire.pair(
    Placement,
    plan_pb2.PartitionPlacement,
    renamed={"rank": "index"},
    only_value=[*_PROCESS_STATE, "active", "shards", "device", "numerics_class", "standby", "synced"],
    only_message=["standby"],
)
_STANDBY = _wire.pair(
    Placement,
    plan_pb2.Standby,
    renamed={"synced": "in_sync"},
    only_value=[*_PROCESS_STATE, "rank", "active", "shards", "device", "numerics_class", "standby"],
)
_PLAN = _wire.pair(
    Plan, plan_pb2.Plan, only_value=["standbys"], only_message=["job_id", "layout_json", "data_token", "mixed"]
)
_CREDENTIALS = _wire.pair(Credentials, plan_pb2.Credentials)
_KINDS = {
    ProcessKind.TRAINER: plan_pb2.ProcessSpec.KIND_TRAINER,
    ProcessKind.PARTITION: plan_pb2.ProcessSpec.KIND_PARTITION,
}


def master_message(message: StreamMessage) -> agents_pb2.MasterMessage:
    """What the loop sends on an agent's stream."""
    if isinstance(message, Acknowledgement):
        return agents_pb2.MasterMessage(ack=agents_pb2.Acknowledged(sequence=message.sequence))
    if isinstance(message, ProbeOrder):
        return agents_pb2.MasterMessage(probe=probe_proto.order(message))
    assignment = agents_pb2.Assignment(
        revision=message.revision,
        processes=[_process_spec(process, message) for process in message.processes],
        depots=[agents_pb2.DepotAddress(node_id=node_id, address=address) for node_id, address in message.depots],
        deleted_jobs=message.deleted,
        revoked_serials=message.revoked,
    )
    return agents_pb2.MasterMessage(assignment=assignment)


def _process_spec(process: Desired, assignment: Assignment) -> plan_pb2.ProcessSpec:
    job, credentials = process.job, assignment.credentials.get(process.process_id)
    spec = plan_pb2.ProcessSpec(
        process_id=process.process_id,
        kind=_KINDS[process.placement.kind],
        job_id=job.job_id,
        rank=process.placement.rank,
        attempt=process.placement.attempt,
        spec_json=job.spec.canonical_json(),
        bundle_sha256=job.bundle_sha256,
        store=job.store,
        cluster_id=assignment.cluster_id,
        data_security=assignment.data_security,
        credentials=None if credentials is None else _CREDENTIALS.encode(credentials),
    )
    if process.plan is not None:
        spec.plan.CopyFrom(plan(job, process.plan))
        spec.plan.layout_json = job.layout_json
        spec.plan.data_token = job.data_token
    return spec


def plan(job: Job, m: Plan, microbatch_s: Mapping[int, float] = MappingProxyType({})) -> plan_pb2.Plan:
    """The plan without layout and token, as clients may see it. `microbatch_s`: by rank."""
    counted = {placement.rank for placement in counted_on(m.trainers)}
    return _PLAN.encode(
        m,
        job_id=job.job_id,
        mixed=job.numerics_mode == "mixed",
        trainers=[
            _TRAINER.encode(own, active=own.rank in counted, microbatch_s=microbatch_s.get(own.rank, 0.0))
            for own in m.trainers
        ],
        partitions=[_PARTITION.encode(own, standby=_standby(job, m, own.rank)) for own in m.partitions],
    )


def _standby(job: Job, m: Plan, rank: int) -> plan_pb2.Standby | None:
    """The standby of a partition in a plan; `in_sync` as the job has it now."""
    standby, now = next((own for own in m.standbys if own.rank == rank), None), job.standby(rank)
    if standby is None:
        return None
    return _STANDBY.encode(standby, in_sync=now is not None and now.attempt == standby.attempt and now.synced)


# What clients receive

_wire.pair(Best, plan_pb2.BestSnapshot)
_wire.pair(Condition, jobs_pb2.Condition)
_wire.pair(VouchedNode, jobs_pb2.VouchedNode)
_wire.pair(Audits, jobs_pb2.Audits, only_value=["step"])
_EVENT = _wire.pair(Event, jobs_pb2.Event, only_value=["subject", "seconds"])
CLUSTER_NODE = _wire.pair(
    Node,
    jobs_pb2.Node,
    renamed=_RESOURCES,
    only_value=_OF_THE_MASTER,
    only_message=["ready", "processes", "drain", "waits_for"],
)
_JOB = _wire.pair(
    Job,
    jobs_pb2.Job,
    only_value=[
        *VOLATILE, "spec", "request_id", "data_token", "stopping", "trainers", "partitions", "standbys", "attempts",
        "excluded", "layout_json", "layout_sha256", "data_fingerprint", "numerics_mode", "numerics_class",
        "optimizer_class", "high_step", "grad_norm", "nonfinite", "next_best", "finished", "snapshot_warning", "saving",
        "held", "crashes", "mismatch", "going_back",
    ],
    only_message=["spec_json", "workers_active", "workers_wanted", "events", *reports.Rates._fields],
)  # fmt: skip


def job(
    m: Job, events: tuple[Event, ...], now: Instant, *, full: bool, processes: Processes = MappingProxyType({})
) -> jobs_pb2.Job:
    """A job as clients see it; `full` adds its plan, with how fast its `processes` compute, events and checks."""
    given: dict[str, Any] = reports.rates(m, now)._asdict()
    if full:
        speeds = rebalance.measured_speeds(m.trainers, m.job_id, processes)
        by_rank = {rank: speed.microbatch_s for rank, speed in speeds.items()}
        given |= {"events": map(_EVENT.encode, events), "plan": plan(m, m.plan, by_rank) if m.plan else None}
    else:
        given |= {"plan": None, "connections": (), "checks": ()}
    return _JOB.encode(
        m,
        spec_json=m.spec.canonical_json(),
        workers_active=sum(1 for placement in m.trainers if placement.active and placement.shards),
        workers_wanted=len(m.trainers),
        **given,
    )


def snapshots(m: Job, catalogue: Catalogue) -> list[jobs_pb2.Snapshot]:
    """The complete snapshots, oldest first."""
    best = m.best.step if m.best is not None else None
    return [
        jobs_pb2.Snapshot(step=point.step, parts=map(_PART.encode, point.parts), best=point.step == best)
        for point in catalogue.restore_points()
    ]
