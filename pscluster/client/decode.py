"""Protobuf messages of the master as the client's records."""

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
from pscluster.v1 import agents_pb2, jobs_pb2, plan_pb2


def job_of(message: jobs_pb2.Job) -> Job:
    m = message
    return Job(
        job_id=m.job_id,
        name=m.name,
        state=jobs_pb2.JobState.Name(m.state).removeprefix("JOB_STATE_"),
        reason=m.reason,
        created_s=m.created_s,
        started_s=m.started_s or None,
        ended_s=m.ended_s or None,
        step=m.step,
        final_step=m.final_step or None,
        loss=m.loss if m.step and math.isfinite(m.loss) else None,
        steps_per_s=m.steps_per_s,
        samples_per_s=m.samples_per_s,
        weight_per_s=m.weight_per_s,
        workers_active=m.workers_active,
        workers_wanted=m.workers_wanted,
        generation=m.generation,
        numerics=m.numerics,
        parameters_sha256=m.parameters_sha256 or None,
        metrics=dict(m.metrics),
        metrics_step=m.metrics_step,
        best=Best(step=m.best.step, value=m.best.value) if m.HasField("best") else None,
        error=_error_of(m.error) if m.HasField("error") else None,
        traceback=m.traceback,
        conditions=tuple(_condition_of(c) for c in m.conditions),
        events=tuple(Event(time_s=e.time_s, reason=e.reason, message=e.message, warning=e.warning) for e in m.events),
        plan=_plan_of(m.plan) if m.HasField("plan") else None,
        connections=tuple(
            DataConnection(trainer=c.trainer, partition=c.partition, transport=c.transport) for c in m.connections
        ),
        checks=tuple(PreflightCheck(node_id=c.node_id, name=c.name, ok=c.ok, detail=c.detail) for c in m.checks),
        store=m.store,
        directory=m.directory,
        bundle_sha256=m.bundle_sha256 or None,
        revision=m.revision,
        spec=json.loads(m.spec_json) if m.spec_json else {},
    )


def _condition_of(c: jobs_pb2.Condition) -> Condition:
    return Condition(type=c.type, status=c.status, reason=c.reason, message=c.message, since_s=c.since_s)


def _error_of(detail: plan_pb2.ErrorDetail) -> PsError:
    return from_dict(
        {
            "code": detail.code,
            "cause": detail.cause,
            "action": detail.action,
            "details": dict(detail.details),
        }
    )


def _plan_of(plan: plan_pb2.Plan) -> Plan:
    return Plan(
        generation=plan.generation,
        restore_generation=plan.restore_generation,
        resume_step=plan.resume_step,
        stop=plan.stop,
        trainers=tuple(
            TrainerPlacement(
                rank=t.rank,
                node_id=t.node_id,
                attempt=t.attempt,
                active=t.active,
                device=t.device or None,
                shards=tuple((run.first, run.count) for run in t.shards),
                microbatch_s=t.microbatch_s or None,
            )
            for t in plan.trainers
        ),
        partitions=tuple(_partition_of(p) for p in plan.partitions),
    )


def _partition_of(p: plan_pb2.PartitionPlacement) -> PartitionPlacement:
    standby = None
    if p.HasField("standby"):
        s = p.standby
        standby = Standby(node_id=s.node_id, attempt=s.attempt, addresses=tuple(s.addresses), in_sync=s.in_sync)
    return PartitionPlacement(
        index=p.index, node_id=p.node_id, attempt=p.attempt, addresses=tuple(p.addresses), standby=standby
    )


def node_of(m: jobs_pb2.Node) -> Node:
    return Node(
        node_id=m.node_id,
        role=agents_pb2.Role.Name(m.role).removeprefix("ROLE_").lower(),
        ready=m.ready,
        incarnation=m.incarnation,
        cpu_cores=m.resources.cpu_cores,
        memory_bytes=m.resources.memory_bytes,
        devices=tuple(m.resources.devices),
        slots=m.resources.slots,
        last_beat_s=m.last_beat_s or None,
        version=m.version,
        hostname=m.hostname,
        processes=tuple(m.processes),
        metrics_address=m.metrics_address,
        depot_address=m.depot_address,
        drain=m.drain or None,
        waits_for=tuple(m.waits_for),
    )


def snapshot_of(m: jobs_pb2.Snapshot) -> Snapshot:
    return Snapshot(
        step=m.step,
        best=m.best,
        parts=tuple(
            SnapshotPart(
                partition=p.partition, path=p.path, size_bytes=p.size_bytes, checksum=p.checksum, nodes=tuple(p.nodes)
            )
            for p in sorted(m.parts, key=lambda part: part.partition)
        ),
    )


def health_of(m: jobs_pb2.Cluster) -> Health:
    return Health(
        healthy=m.healthy,
        problems=tuple(m.problems),
        version=m.version,
        protocol=m.protocol,
        started_s=m.started_s,
        metrics_address=m.metrics_address,
    )


def log_line_of(m: jobs_pb2.LogRecord) -> LogLine:
    return LogLine(source=m.source, time_s=m.line.time_s, stream=m.line.stream, text=m.line.text)
