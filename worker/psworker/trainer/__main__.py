"""A trainer process: started by an agent, ends with it. `python -m psworker.trainer`"""

from __future__ import annotations

import faulthandler
import json
import sys
from dataclasses import asdict
from pathlib import Path

from pscluster.agent.link import HeartbeatThread, ProcessLink
from pscluster.agent.status import detail_of
from pscluster.devices import CPU
from pscluster.errors import PsError
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.sampling import ShardSampler
from pscluster.v1.plan_pb2 import Beat, Failure, PreflightCheck, ProcessReport, TrainerReady
from pscluster.wire.transport import check_congestion_control
from psworker.numerics import settle_numerics
from psworker.replica import Replica
from psworker.staging import keep_freed_memory, staging_for, usable_device
from psworker.trainer.data.batches import Batches, EvalBatches
from psworker.trainer.data.loading import build_model, user_traceback
from psworker.trainer.exchange import Exchange
from psworker.trainer.first_model import settle_model
from psworker.trainer.loop import Trainer
from psworker.trainer.preflight.prepare import Prepared, prepare
from psworker.trainer.preflight.table import checks_of
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
    replica = Replica(prepared.model, spec.train.optimizer, staging, spec.train.unfreeze_at)
    if spec.train.compile:
        replica.model.compile()
    sampler = ShardSampler(len(prepared.train), spec.train.num_shards, spec.train.microbatch, spec.train.seed)
    link.report(ProcessReport(trainer_ready=_ready(prepared, replica, spec, sampler, device)))
    train, held_out = spec.train, prepared.held_out
    eval_batches = None
    if held_out is not None:
        collate = prepared.task.collate
        eval_batches = EvalBatches(held_out, collate, train.num_shards, train.microbatch, train.seed)
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
            eval_batches,
            exchange,
            counters,
            lambda: _rebuild(prepared, replica, spec),
        ).run()
    finally:
        exchange.close()
        staging.close()


def _rebuild(prepared: Prepared, replica: Replica, spec: JobSpec) -> None:
    """Set the replica's memory to the seeded first values again: the job went back to step 0."""
    built = build_model(prepared.task)
    model, _ = settle_model(prepared.task, built, prepared.train, spec, CPU)
    fresh = Replica(model, spec.train.optimizer, unfreeze_at=spec.train.unfreeze_at)
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
        checks=[PreflightCheck(**asdict(check)) for check in preflight.checks],
        device=device,
        final_step=sampler.final_step(spec.train.max_steps, spec.train.epochs),
    )


def _failure(error: PsError) -> Failure:
    """The error as the master stores it: the traceback apart, the preflight's table as messages."""
    checks = [PreflightCheck(**asdict(check)) for check in checks_of(error)]
    error.details.pop("checks", None)
    traceback = error.details.pop("traceback", "")
    if not traceback and error.__cause__ is not None:
        traceback = user_traceback(error.__cause__)
    return Failure(error=detail_of(error), traceback=traceback, checks=checks)


if __name__ == "__main__":
    sys.exit(main())
