"""The domain's values as what agents and clients receive. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import cast

from pscluster.v1 import agents_pb2, jobs_pb2, plan_pb2
from psmaster.model import membership, reports
from psmaster.model.job import Condition, ErrorInfo, Event, Instant, Job, JobState
from psmaster.model.membership import Health, Node, Role
from psmaster.model.plan import Placement, Plan, ProcessKind, counted_on
from psmaster.model.process import Processes
from psmaster.model.snapshot_catalog import Catalogue, Part
from psmaster.model.speed import MeasuredSpeed
from psmaster.scheduling import rebalance
from psmaster.scheduling.reconcile import Desired

_STATES = {state: cast("jobs_pb2.JobState", jobs_pb2.JobState.Value(f"JOB_STATE_{state.name}")) for state in JobState}
_KINDS = {
    ProcessKind.TRAINER: plan_pb2.ProcessSpec.KIND_TRAINER,
    ProcessKind.PARTITION: plan_pb2.ProcessSpec.KIND_PARTITION,
}
_ROLES = {Role.WORKER: agents_pb2.Role.ROLE_WORKER, Role.SERVER: agents_pb2.Role.ROLE_SERVER}


def assignment(
    wanted: Iterable[tuple[Job, Desired]], depots: Iterable[tuple[str, str]], deleted: Iterable[str], revision: int
) -> agents_pb2.Assignment:
    """All that one node is to run, (node, address) of those that keep copies of snapshots, and the jobs whose copies
    may go."""
    return agents_pb2.Assignment(
        revision=revision,
        processes=[_process_spec(job, process) for job, process in wanted],
        depots=[agents_pb2.DepotAddress(node_id=node_id, address=address) for node_id, address in depots],
        deleted_jobs=deleted,
    )


def _process_spec(job: Job, process: Desired) -> plan_pb2.ProcessSpec:
    spec = plan_pb2.ProcessSpec(
        process_id=process.process_id,
        kind=_KINDS[process.placement.kind],
        job_id=job.job_id,
        rank=process.placement.rank,
        attempt=process.placement.attempt,
        spec_json=job.spec.canonical_json(),
        bundle_sha256=job.bundle_sha256,
        store=job.store,
    )
    if process.plan is not None:
        spec.plan.CopyFrom(plan(job, process.plan))
        spec.plan.layout_json = job.layout_json
        spec.plan.data_token = job.data_token
    return spec


def plan(job: Job, m: Plan) -> plan_pb2.Plan:
    """The plan without layout and token: what people may see."""
    counted = {placement.rank for placement in counted_on(m.trainers)}
    message = plan_pb2.Plan(
        job_id=job.job_id,
        generation=m.generation,
        trainers=[_trainer_placement(placement, active=placement.rank in counted) for placement in m.trainers],
        partitions=[_partition_placement(job, m, placement) for placement in m.partitions],
        restore_generation=m.restore_generation,
        resume_step=m.resume_step,
        stop=m.stop,
        save=m.save,
        kept_steps=m.kept_steps,
        final_step=m.final_step,
        moved_generation=m.moved_generation,
        coordinator_generation=m.coordinator_generation,
    )
    if m.restore is not None:
        message.restore.step = m.restore.step
        message.restore.parts.extend(_part(part) for part in m.restore.parts)
    return message


def _trainer_placement(placement: Placement, *, active: bool) -> plan_pb2.TrainerPlacement:
    return plan_pb2.TrainerPlacement(
        rank=placement.rank,
        node_id=placement.node_id,
        attempt=placement.attempt,
        shards=[plan_pb2.ShardRange(first=first, count=count) for first, count in placement.shards],
        active=active,
        device=placement.device,
    )


def _partition_placement(job: Job, m: Plan, placement: Placement) -> plan_pb2.PartitionPlacement:
    message = plan_pb2.PartitionPlacement(
        index=placement.rank, node_id=placement.node_id, attempt=placement.attempt, addresses=placement.addresses
    )
    for standby in m.standbys:
        if standby.rank == placement.rank:
            now = job.standby(placement.rank)
            in_sync = now is not None and now.attempt == standby.attempt and now.synced
            message.standby.CopyFrom(
                plan_pb2.Standby(
                    node_id=standby.node_id, attempt=standby.attempt, addresses=standby.addresses, in_sync=in_sync
                )
            )
    return message


def _part(part: Part) -> plan_pb2.SnapshotPart:
    return plan_pb2.SnapshotPart(
        step=part.step,
        partition=part.partition,
        generation=part.generation,
        path=part.path,
        size_bytes=part.size_bytes,
        checksum=part.checksum,
        nodes=part.nodes,
    )


def job(
    m: Job, events: tuple[Event, ...], now: Instant, *, full: bool, processes: Processes = MappingProxyType({})
) -> jobs_pb2.Job:
    """A job as clients see it; `full` adds its plan, with how fast its `processes` compute, events and checks."""
    rates = reports.rates(m, now)
    message = jobs_pb2.Job(
        job_id=m.job_id,
        name=m.name,
        state=_STATES[m.state],
        reason=m.reason,
        created_s=m.created_s,
        started_s=m.started_s,
        ended_s=m.ended_s,
        spec_json=m.spec.canonical_json(),
        bundle_sha256=m.bundle_sha256,
        generation=m.generation,
        step=m.step,
        final_step=m.final_step,
        loss=m.loss,
        steps_per_s=rates.steps_per_s,
        samples_per_s=rates.samples_per_s,
        weight_per_s=rates.weight_per_s,
        workers_active=sum(1 for placement in m.trainers if placement.active and placement.shards),
        workers_wanted=len(m.trainers),
        conditions=[_condition(condition) for condition in m.conditions],
        traceback=m.traceback,
        parameters_sha256=m.parameters_sha256,
        numerics=m.numerics,
        metrics=dict(m.metrics),
        metrics_step=m.metrics_step,
        store=m.store,
        directory=m.directory,
        revision=m.revision,
    )
    if m.error is not None:
        message.error.CopyFrom(_error(m.error))
    if m.best is not None:
        message.best.step, message.best.value = m.best.step, m.best.value
    if full:
        _add_details(message, m, events)
        paces = rebalance.paces_of(m.trainers, m.job_id, processes)
        for placement in message.plan.trainers:
            placement.microbatch_s = paces.get(placement.rank, MeasuredSpeed()).microbatch_s
    return message


def _add_details(message: jobs_pb2.Job, m: Job, events: tuple[Event, ...]) -> None:
    message.events.extend(_event(event) for event in events)
    message.connections.extend(
        plan_pb2.Connection(trainer=c.trainer, partition=c.partition, transport=c.transport) for c in m.connections
    )
    message.checks.extend(
        plan_pb2.PreflightCheck(name=c.name, ok=c.ok, detail=c.detail, node_id=c.node_id) for c in m.checks
    )
    if m.plan is not None:
        message.plan.CopyFrom(plan(m, m.plan))


def _condition(m: Condition) -> jobs_pb2.Condition:
    return jobs_pb2.Condition(type=m.type, status=m.status, reason=m.reason, message=m.message, since_s=m.since_s)


def _event(m: Event) -> jobs_pb2.Event:
    return jobs_pb2.Event(time_s=m.time_s, reason=m.reason, message=m.message, warning=m.warning)


def _error(m: ErrorInfo) -> plan_pb2.ErrorDetail:
    return plan_pb2.ErrorDetail(code=m.code, cause=m.cause, action=m.action, details=dict(m.details))


def node(
    m: Node,
    processes: Iterable[str],
    now: Instant,
    suspicion_s: float,
    *,
    drain: str = "",
    waits_for: Iterable[str] = (),
) -> jobs_pb2.Node:
    """A node as clients see it, with the ids of the processes that it is to run."""
    return jobs_pb2.Node(
        node_id=m.node_id,
        role=_ROLES[m.role],
        ready=membership.health(m, now.mono_s, suspicion_s) is Health.READY,
        incarnation=m.incarnation,
        resources=agents_pb2.Resources(
            cpu_cores=m.cpu_cores, memory_bytes=m.memory_bytes, devices=m.devices, slots=m.slots
        ),
        last_beat_s=m.last_beat_s,
        version=m.version,
        hostname=m.hostname,
        processes=sorted(processes),
        metrics_address=m.metrics_address,
        depot_address=m.depot_address,
        drain=drain,
        waits_for=waits_for,
    )


def snapshots(m: Job, catalogue: Catalogue) -> list[jobs_pb2.Snapshot]:
    """The complete snapshots, oldest first."""
    best = m.best.step if m.best is not None else None
    return [
        jobs_pb2.Snapshot(
            step=step, parts=[_part(part) for part in catalogue.restore_point(step).parts], best=step == best
        )
        for step in catalogue.complete_steps()
    ]
