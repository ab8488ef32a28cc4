"""What a client reads of a cluster, as plain frozen records, decoded from the master's messages by field names (see
`pscluster.rpc.codec`). States are words, times are Unix seconds, what is not known yet is None."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from pscluster.errors import NotFoundError, PsError, from_dict
from pscluster.rpc.codec import Wire
from pscluster.v1 import agents_pb2, jobs_pb2, plan_pb2

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
"""The states in which nothing of a job runs."""


class Record:
    """Plain data that a client reads."""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types, keys in the order of its fields."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: _plain(getattr(self, field.name)) for field in fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Record | PsError):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, kw_only=True)
class Condition(Record):
    type: str
    status: bool
    reason: str
    message: str
    since_s: float


@dataclass(frozen=True, kw_only=True)
class Event(Record):
    time_s: float
    reason: str
    message: str
    warning: bool


@dataclass(frozen=True, kw_only=True)
class TrainerPlacement(Record):
    """`shards` holds (first, count) runs; `device` is "cpu" or "cuda:0", None while it is not active; `microbatch_s`:
    seconds of its own computing that a microbatch takes it, None before that is known."""

    rank: int
    node_id: str
    attempt: int
    active: bool
    device: str | None
    shards: tuple[tuple[int, int], ...]
    microbatch_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Standby(Record):
    """`in_sync`: nothing is lost when it takes over."""

    node_id: str
    attempt: int
    addresses: tuple[str, ...]
    in_sync: bool


@dataclass(frozen=True, kw_only=True)
class PartitionPlacement(Record):
    """`standby`: None where nobody stands by, or nobody yet."""

    index: int
    node_id: str
    attempt: int
    addresses: tuple[str, ...]
    standby: Standby | None = None


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    generation: int
    restore_generation: int
    resume_step: int
    stop: bool
    trainers: tuple[TrainerPlacement, ...]
    partitions: tuple[PartitionPlacement, ...]


@dataclass(frozen=True, kw_only=True)
class DataConnection(Record):
    trainer: int
    partition: int
    transport: str


@dataclass(frozen=True, kw_only=True)
class PreflightCheck(Record):
    node_id: str
    name: str
    ok: bool
    detail: str
    warning: bool


@dataclass(frozen=True, kw_only=True)
class Best(Record):
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class VouchedNode(Record):
    """`step`: the newest in which the node's trainer computed the same as another; `alone`: as itself, a second
    time."""

    node_id: str
    step: int
    alone: bool


@dataclass(frozen=True, kw_only=True)
class Audits(Record):
    """Counts of audits by result."""

    equal: int = 0
    differing: int = 0
    unfinished: int = 0
    vouched: tuple[VouchedNode, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job(Record):
    """One job at one moment. `plan` is there only when the job was asked for by itself."""

    job_id: str
    name: str
    state: str
    reason: str
    created_s: float
    started_s: float | None
    ended_s: float | None
    step: int
    final_step: int | None
    loss: float | None
    steps_per_s: float
    samples_per_s: float
    weight_per_s: float
    workers_active: int
    workers_wanted: int
    generation: int
    numerics: str
    parameters_sha256: str | None
    metrics: dict[str, float]
    metrics_step: int
    best: Best | None
    error: PsError | None
    traceback: str
    conditions: tuple[Condition, ...]
    events: tuple[Event, ...]
    plan: Plan | None
    connections: tuple[DataConnection, ...]
    checks: tuple[PreflightCheck, ...]
    store: str
    directory: str
    bundle_sha256: str | None
    revision: int
    audits: Audits
    owner: str
    spec: dict[str, Any]

    @property
    def ended(self) -> bool:
        """Whether it is over: succeeded, failed or stopped."""
        return self.state in ENDED


@dataclass(frozen=True, kw_only=True)
class Node(Record):
    """`drain`: "draining" while jobs run there that are to go, "drained" then, None when it takes processes;
    `waits_for` says what a draining node waits for. `incarnation` is empty for a node that is drained and away.
    `advertised_host`: where other hosts reach it, empty if none do; `data_ports`: "first-last", empty if any port is
    used; `isolation`: how user code is kept from the node's key, empty for a node that does not say."""

    node_id: str
    role: str
    ready: bool
    incarnation: str
    cpu_cores: int
    memory_bytes: int
    devices: tuple[str, ...]
    slots: int
    last_beat_s: float | None
    version: str
    hostname: str
    processes: tuple[str, ...]
    metrics_address: str
    depot_address: str = ""
    drain: str | None = None
    waits_for: tuple[str, ...] = ()
    advertised_host: str = ""
    isolation: str = ""
    data_ports: str = ""


@dataclass(frozen=True, kw_only=True)
class SnapshotPart(Record):
    """`path` is below the job's store; or each of `nodes` has it for itself."""

    partition: int
    path: str
    size_bytes: int
    checksum: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Snapshot(Record):
    step: int
    best: bool
    parts: tuple[SnapshotPart, ...]


@dataclass(frozen=True, kw_only=True)
class Health(Record):
    """`time_s`: the master's clock when it answered; `addresses` and `join_addresses`: where it listens."""

    healthy: bool
    problems: tuple[str, ...]
    version: str
    protocol: int
    started_s: float
    metrics_address: str
    cluster_id: str
    secured: bool
    time_s: float
    addresses: tuple[str, ...]
    join_addresses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LogLine(Record):
    """`source` is the role and rank of the process: "trainer-0"."""

    source: str
    time_s: float
    stream: str
    text: str


def _error_of(m: plan_pb2.ErrorDetail) -> PsError:
    return from_dict({"code": m.code, "cause": m.cause, "action": m.action, "details": m.details})


_wire = Wire()
_wire.adapt(PsError, plan_pb2.ErrorDetail, _error_of, lambda error: plan_pb2.ErrorDetail(**error.to_dict()))
_wire.pair(Best, plan_pb2.BestSnapshot)
_wire.pair(Condition, jobs_pb2.Condition)
_wire.pair(Event, jobs_pb2.Event)
_wire.pair(VouchedNode, jobs_pb2.VouchedNode)
_wire.pair(Audits, jobs_pb2.Audits)
_wire.pair(DataConnection, plan_pb2.Connection)
_wire.pair(PreflightCheck, plan_pb2.PreflightCheck)
_wire.pair(Standby, plan_pb2.Standby)
_wire.pair(TrainerPlacement, plan_pb2.TrainerPlacement, only_message=["numerics_class"])
_wire.pair(PartitionPlacement, plan_pb2.PartitionPlacement)
_wire.pair(
    Plan,
    plan_pb2.Plan,
    only_message=[
        "job_id", "layout_json", "data_token", "restore", "kept_steps", "final_step", "moved_generation",
        "coordinator_generation", "mixed", "save",
    ],
)  # fmt: skip
_JOB = _wire.pair(Job, jobs_pb2.Job, only_value=["spec"], only_message=["spec_json"])
_NODE = _wire.pair(
    Node,
    jobs_pb2.Node,
    renamed={name: f"resources.{name}" for name in ("cpu_cores", "memory_bytes", "devices", "slots")},
)
_PART = _wire.pair(SnapshotPart, plan_pb2.SnapshotPart, only_message=["step", "generation"])
_SNAPSHOT = _wire.pair(Snapshot, jobs_pb2.Snapshot)
health_of = _wire.pair(Health, jobs_pb2.Cluster).decode
log_line_of = _wire.pair(
    LogLine, jobs_pb2.LogRecord, renamed={name: f"line.{name}" for name in ("time_s", "stream", "text")}
).decode


def job_of(m: jobs_pb2.Job) -> Job:
    return _JOB.decode(
        m,
        loss=m.loss if m.step and math.isfinite(m.loss) else None,
        spec=json.loads(m.spec_json) if m.spec_json else {},
    )


def node_of(m: jobs_pb2.Node) -> Node:
    return _NODE.decode(m, role=agents_pb2.Role.Name(m.role).removeprefix("ROLE_").lower())


def snapshot_of(m: jobs_pb2.Snapshot) -> Snapshot:
    parts = sorted(m.parts, key=lambda part: part.partition)
    return _SNAPSHOT.decode(m, parts=tuple(map(_PART.decode, parts)))


def choose(snapshots: list[Snapshot], which: int | str, job: str) -> Snapshot:
    """Choose by "last", "best" or step. Raises NotFoundError naming the existing steps."""
    for snapshot in reversed(snapshots):
        if which in ("last", snapshot.step) or (which == "best" and snapshot.best):
            return snapshot
    wanted = {"last": "yet", "best": "of its best step yet"}.get(str(which), f"of step {which}")
    steps = ", ".join(f"{s.step} (best)" if s.best else str(s.step) for s in snapshots)
    none = "one is written every durability.every_steps and at the end"
    raise NotFoundError(f"{job} has no complete snapshot {wanted}", action=f"there are: {steps}" if steps else none)
