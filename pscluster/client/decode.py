"""The master's protobuf messages as the client's records, by field names (see `pscluster.rpc.codec`).

The tables below name the exceptions. `None` stands for what is not known yet, which is zero or empty on the wire."""

from __future__ import annotations

import json
import math

from pscluster.client.records import (
    Best,
    Condition,
    DataConnection,
    Event,
    Health,
    Job,
    LogLine,
    Node,
    PartitionPlacement,
    Plan,
    PreflightCheck,
    Snapshot,
    SnapshotPart,
    Standby,
    TrainerPlacement,
)
from pscluster.errors import PsError, from_dict
from pscluster.rpc.codec import Wire
from pscluster.v1 import agents_pb2, jobs_pb2, plan_pb2


def _error_of(m: plan_pb2.ErrorDetail) -> PsError:
    return from_dict({"code": m.code, "cause": m.cause, "action": m.action, "details": m.details})


_wire = Wire()
_wire.adapt(PsError, plan_pb2.ErrorDetail, _error_of, lambda error: plan_pb2.ErrorDetail(**error.to_dict()))
_wire.pair(Best, plan_pb2.BestSnapshot)
_wire.pair(Condition, jobs_pb2.Condition)
_wire.pair(Event, jobs_pb2.Event)
_wire.pair(DataConnection, plan_pb2.Connection)
_wire.pair(PreflightCheck, plan_pb2.PreflightCheck)
_wire.pair(Standby, plan_pb2.Standby)
_wire.pair(TrainerPlacement, plan_pb2.TrainerPlacement)
_wire.pair(PartitionPlacement, plan_pb2.PartitionPlacement)
_wire.pair(
    Plan,
    plan_pb2.Plan,
    only_message=[
        "job_id", "layout_json", "data_token", "restore", "kept_steps", "final_step", "moved_generation",
        "coordinator_generation", "save",
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
_HEALTH = _wire.pair(Health, jobs_pb2.Cluster)
_LOG_LINE = _wire.pair(
    LogLine, jobs_pb2.LogRecord, renamed={name: f"line.{name}" for name in ("time_s", "stream", "text")}
)


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


def health_of(m: jobs_pb2.Cluster) -> Health:
    return _HEALTH.decode(m)


def log_line_of(m: jobs_pb2.LogRecord) -> LogLine:
    return _LOG_LINE.decode(m)
