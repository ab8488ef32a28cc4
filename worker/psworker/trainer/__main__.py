"""A trainer process: started by an agent, ends with it. `python -m psworker.trainer`"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

from pscluster.agent.link import HeartbeatThread, ProcessLink
from pscluster.errors import PsError
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.sampling import ShardSampler
from pscluster.v1.plan_pb2 import Beat, ErrorDetail, Failure, PreflightCheck, ProcessReport, TrainerReady
from pscluster.wire.transport import check_congestion_control
from psworker.numerics import settle_numerics
from psworker.replica import Replica
from psworker.staging import staging_for
from psworker.trainer.data.batches import Batches, EvalBatches
from psworker.trainer.data.loading import build_model, user_traceback
from psworker.trainer.device import keep_freed_memory, usable_device
from psworker.trainer.exchange import Exchange
from psworker.trainer.loop import Trainer
from psworker.trainer.preflight.run import CheckResult, Prepared, checks_of, prepare
from psworker.trainer.telemetry import TrainerCounters

EXIT_FAILED = 1


def main() -> int:
    """Run the trainer that the agent's start order describes; returns the exit code."""
    faulthandler.enable()
    link = ProcessLink.from_environment()
    loading = HeartbeatThread(link, Beat)
    loading.start()
    try:
        _train(link, loading)
    except PsError as error:
        link.report(ProcessReport(failure=_failure(error)))
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return 0


def _train(link: ProcessLink, loading: HeartbeatThread) -> None:
    """`loading` sends heartbeats until the exchange does."""
    start = link.start
    spec = parse_spec(json.loads(start.spec_json))
    device = usable_device(start.device, spec.workers.device)
    check_congestion_control(spec.network.congestion_control)
    keep_freed_memory()
    settle_numerics(spec.workers.threads, device)
    prepared = prepare(spec, Path.cwd() if start.bundle_sha256 else None, device)
    staging = staging_for(device)
    replica = Replica(prepared.model, spec.train.optimizer, staging)
    if spec.train.compile:
        replica.model.compile()
    sampler = ShardSampler(len(prepared.train), spec.train.num_shards, spec.train.microbatch, spec.train.seed)
    link.report(ProcessReport(trainer_ready=_ready(prepared, replica, spec, sampler, device)))
    counters = TrainerCounters()
    exchange = Exchange(link, spec, replica.layout, replica.memory, counters, staging)
    exchange.start()
    loading.close()
    try:
        Trainer(
            spec,
            prepared.task,
            replica,
            Batches(prepared.train, prepared.task.collate, sampler, spec.train.seed),
            _held_out(prepared, spec),
            exchange,
            counters,
            lambda: _rebuild(prepared, replica, spec),
        ).run()
    finally:
        exchange.close()
        staging.close()


def _held_out(prepared: Prepared, spec: JobSpec) -> EvalBatches | None:
    if prepared.held_out is None:
        return None
    train = spec.train
    return EvalBatches(prepared.held_out, prepared.task.collate, train.num_shards, train.microbatch, train.seed)


def _rebuild(prepared: Prepared, replica: Replica, spec: JobSpec) -> None:
    """Set the replica's memory to the seeded first values again: the job went back to step 0."""
    fresh = Replica(build_model(prepared.task), spec.train.optimizer)
    replica.memory.close_windows()
    for mine, theirs in zip(replica.memory.flats, fresh.flats, strict=True):
        mine.copy_(theirs)


def _ready(prepared: Prepared, replica: Replica, spec: JobSpec, sampler: ShardSampler, device: str) -> TrainerReady:
    preflight = prepared.preflight
    return TrainerReady(
        layout_json=replica.layout.to_json(),
        layout_sha256=replica.layout.sha256,
        data_fingerprint=preflight.fingerprint,
        numerics_class=preflight.numerics_class,
        numerics_detail=preflight.numerics_detail,
        checks=[_check(check) for check in preflight.checks],
        device=device,
        final_step=sampler.final_step(spec.train.max_steps, spec.train.epochs),
    )


def _failure(error: PsError) -> Failure:
    """The error as the master stores it: the traceback apart, the preflight's table as messages."""
    details = {key: value for key, value in error.details.items() if key not in ("traceback", "checks")}
    traceback = error.details.get("traceback", "")
    if not traceback and error.__cause__ is not None:
        traceback = user_traceback(error.__cause__)
    return Failure(
        error=ErrorDetail(code=error.code, cause=error.cause, action=error.action, details=details),
        traceback=traceback,
        checks=[_check(check) for check in checks_of(error)],
    )


def _check(check: CheckResult) -> PreflightCheck:
    return PreflightCheck(name=check.name, ok=check.ok, detail=check.detail)


if __name__ == "__main__":
    sys.exit(main())
