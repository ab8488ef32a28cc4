"""What agents and clients send, as the domain's values. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pscluster.errors import CallerError, InternalError
from pscluster.v1 import agents_pb2, plan_pb2
from psmaster.control.transaction import Report
from psmaster.model.job import DataConnection, ErrorInfo, Finished, JobWarning, PreflightCheck
from psmaster.model.membership import Node, Role
from psmaster.model.process import REACHES_ALL, Exit, Failure, PartitionFacts, Process, TrainerFacts, Unreached
from psmaster.model.reports import Connected, Evaluated, Progress, StandbyState, StepRecord
from psmaster.model.snapshot_catalog import Part

_SUSPICIONS = {
    agents_pb2.ProcessStatus.SUSPICION_SILENT: "silent",
    agents_pb2.ProcessStatus.SUSPICION_STALLED: "stalled",
}
_ROLES = {agents_pb2.Role.ROLE_WORKER: Role.WORKER, agents_pb2.Role.ROLE_SERVER: Role.SERVER}


def node(m: agents_pb2.RegisterRequest) -> Node:
    """Raises CallerError for a request without id, incarnation or role."""
    if not m.node_id or not m.incarnation or m.role not in _ROLES:
        raise CallerError("a node registers with an id, an incarnation and a role", action="see the daemon's flags")
    return Node(
        node_id=m.node_id,
        role=_ROLES[m.role],
        incarnation=m.incarnation,
        slots=m.resources.slots,
        cpu_cores=m.resources.cpu_cores,
        memory_bytes=m.resources.memory_bytes,
        devices=tuple(m.resources.devices),
        version=m.version,
        hostname=m.hostname,
        metrics_address=m.metrics_address,
        depot_address=m.depot_address,
    )


def processes(node_id: str, states: Sequence[agents_pb2.ProcessState]) -> tuple[Process, ...]:
    """Every process that a node's Hello names."""
    return tuple(_process(node_id, state) for state in states)


def _process(node_id: str, state: agents_pb2.ProcessState) -> Process:
    ready = report(state.ready) if state.HasField("ready") else None
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
    """How a process looks while it runs: "silent", "stalled", or empty."""
    return _SUSPICIONS.get(m.suspicion, "") if m.phase == agents_pb2.ProcessStatus.PHASE_RUNNING else ""


def unreached_of(m: agents_pb2.ProcessStatus) -> Unreached:
    """The partitions that a process cannot connect to while it runs."""
    if m.phase != agents_pb2.ProcessStatus.PHASE_RUNNING:
        return REACHES_ALL
    return Unreached(generation=m.unreached.generation, partitions=frozenset(m.unreached.partitions))


def speeds(m: agents_pb2.NodeBeat) -> Mapping[str, tuple[float, int]]:
    """What a node's trainers measured, by process id: seconds a microbatch, and how many were measured."""
    return {process_id: (speed.microbatch_s, speed.microbatches) for process_id, speed in m.speeds.items()}


def exit_of(m: agents_pb2.ProcessStatus) -> Exit | None:
    """How the process ended; None while it runs."""
    if m.phase != agents_pb2.ProcessStatus.PHASE_EXITED:
        return None
    return Exit(
        exit_code=m.exit_code,
        signal=m.signal,
        out_of_memory=m.out_of_memory,
        error=problem(m.error) if m.HasField("error") else None,
        expected=m.expected,
    )


def problem(m: plan_pb2.ErrorDetail) -> ErrorInfo:
    return ErrorInfo(
        code=m.code or InternalError.code,
        cause=m.cause,
        action=m.action,
        details=tuple(sorted(m.details.items())),
    )


def report(m: plan_pb2.ProcessReport) -> Report | None:
    """The report; None for a kind that the master has no use for (counters, beats, plan adopted, newer ones)."""
    kind = m.WhichOneof("body")
    if kind == "trainer_ready":
        return _trainer(m.trainer_ready)
    if kind == "partition_ready":
        return PartitionFacts(
            addresses=tuple(m.partition_ready.addresses),
            numerics_class=m.partition_ready.numerics_class,
            numerics_detail=m.partition_ready.numerics_detail,
        )
    if kind == "progress":
        return _progress(m.progress)
    if kind == "evaluated":
        metrics = tuple(sorted(m.evaluated.metrics.items()))
        return Evaluated(generation=m.evaluated.generation, step=m.evaluated.step, metrics=metrics)
    if kind == "snapshot_part":
        return _part(m.snapshot_part)
    if kind == "finished":
        return Finished(
            generation=m.finished.generation,
            step=m.finished.step,
            stopped=m.finished.stopped,
            parameters_sha256=m.finished.parameters_sha256,
        )
    if kind == "failure":
        return Failure(
            error=problem(m.failure.error),
            traceback=m.failure.traceback,
            step=m.failure.step,
            checks=_checks(m.failure.checks),
        )
    if kind == "connected":
        held = m.connected.connections
        return Connected(
            connections=tuple(
                DataConnection(trainer=c.trainer, partition=c.partition, transport=c.transport) for c in held
            )
        )
    if kind == "standby_state":
        state = m.standby_state
        return StandbyState(
            generation=state.generation, attempt=state.attempt, in_sync=state.in_sync, detail=state.detail
        )
    if kind == "warning":
        told: Any = m.warning  # mypy takes the name for the built-in Warning
        return JobWarning(step=told.step, problem=problem(told.error))
    return None


def _trainer(m: plan_pb2.TrainerReady) -> TrainerFacts:
    return TrainerFacts(
        layout_json=m.layout_json,
        layout_sha256=m.layout_sha256,
        data_fingerprint=m.data_fingerprint,
        numerics_class=m.numerics_class,
        numerics_detail=m.numerics_detail,
        num_samples=m.num_samples,
        checks=_checks(m.checks),
        device=m.device,
        final_step=m.final_step,
    )


def _checks(checks: Sequence[plan_pb2.PreflightCheck]) -> tuple[PreflightCheck, ...]:
    return tuple(PreflightCheck(name=check.name, ok=check.ok, detail=check.detail) for check in checks)


def _part(m: plan_pb2.SnapshotPart) -> Part:
    return Part(
        step=m.step,
        partition=m.partition,
        generation=m.generation,
        path=m.path,
        size_bytes=m.size_bytes,
        checksum=m.checksum,
        nodes=tuple(m.nodes),
    )


def _progress(m: plan_pb2.Progress) -> Progress:
    return Progress(
        generation=m.generation,
        step=m.step,
        records=tuple(_record(record) for record in m.records),
        held=m.held,
    )


def _record(m: plan_pb2.StepRecord) -> StepRecord:
    return StepRecord(
        step=m.step,
        loss=m.loss,
        grad_norm=m.grad_norm,
        lr=m.lr,
        weight=m.weight,
        samples=m.samples,
        skipped=m.skipped,
        time_s=m.time_s,
    )
