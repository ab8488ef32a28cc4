"""A trainer process: started by an agent, ends with it. `python -m psworker.trainer`"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path

from pscluster.agent.cache import hold
from pscluster.agent.launch import SOCKET_DIR
from pscluster.agent.link import HeartbeatThread, ProcessLink
from pscluster.agent.position import position
from pscluster.agent.status import detail_of
from pscluster.devices import CPU
from pscluster.errors import InternalError, OutOfMemoryError, PreflightError, PsError, TaskError
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.sampling import ShardSampler
from pscluster.task import Task
from pscluster.user_frames import frame_details, is_users, place_of, relative_to, user_traceback
from pscluster.v1.plan_pb2 import Beat, Failure, PreflightCheck, ProcessReport, TrainerReady
from pscluster.v1.plan_pb2 import Warning as WarningReport
from pscluster.wire.transport import check_congestion_control
from psworker.numerics import settle_numerics
from psworker.replica import Replica
from psworker.staging import keep_freed_memory, staging_for, usable_device
from psworker.trainer.data.batches import Batches, EvalBatches
from psworker.trainer.data.loading import describe, ran_out_of_memory
from psworker.trainer.exchange import Exchange
from psworker.trainer.first_model import build_anew, settle_model
from psworker.trainer.loop import Trainer
from psworker.trainer.preflight.prepare import Prepared, prepare
from psworker.trainer.preflight.table import checks_of
from psworker.trainer.telemetry import TrainerCounters

EXIT_FAILED = 1
_MOST_REPORTED = 20  # places at which threads ended


def main() -> int:
    """Run the trainer that the agent's start order describes; returns the exit code."""
    link = ProcessLink.from_environment()
    code = Path.cwd()
    position.keep_in(Path(os.environ[SOCKET_DIR]))
    # A KeyboardInterrupt is then what user code raised; a SIGINT ends the process as other signals do.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    loading = HeartbeatThread(link, Beat)
    loading.start()
    _report_errors_of_threads(link, code)
    try:
        with hold(Path(link.start.cache_dir)):
            _train(link, loading)
    except BaseException as error:  # of any kind: nothing else reports what became of this process
        named = _named(error)
        print(named, *traceback.format_exception(error), sep="\n", file=sys.stderr)
        link.report(ProcessReport(failure=_failure(named, code)))
        return EXIT_FAILED
    return 0


def _report_errors_of_threads(link: ProcessLink, code: Path) -> None:
    """Have an exception that ends a thread become a warning of the job, once for each place: training goes on without
    that thread, as Python has it."""
    reported: set[str] = set()

    def report(raised: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(raised)
        if raised.exc_value is None or isinstance(raised.exc_value, SystemExit):
            return
        error = _named(raised.exc_value, "a thread of the task")
        error.details |= frame_details(relative_to(code, error.details.pop("traceback", "")))
        place = place_of(error.details)
        if place not in reported and len(reported) < _MOST_REPORTED:
            reported.add(place)
            error.cause += f" in {place}, and ended" if place else ", and ended"
            link.report(ProcessReport(warning=WarningReport(error=detail_of(error), step=position.step)))

    threading.excepthook = report


def _named(error: BaseException, who: str = "the task") -> PsError:
    """The error to report. One that has no name yet was raised by ourselves, or by user code that we call without
    knowing it, such as a model's own train()."""
    if isinstance(error, PsError):
        return error
    details = {"traceback": user_traceback(error)}
    if ran_out_of_memory(error):
        return OutOfMemoryError(f"a trainer ran out of memory: {describe(error)}", details=details)
    if any(is_users(frame.filename) for frame in traceback.extract_tb(error.__traceback__)):
        return TaskError(f"{who} raised {describe(error)}", details=details)
    return InternalError(f"a trainer raised {describe(error)}", details=details)


def _train(link: ProcessLink, loading: HeartbeatThread) -> None:
    """`loading` sends heartbeats until the exchange does."""
    start = link.start
    spec = parse_spec(json.loads(start.spec_json))
    Task.scratch_dir, Task.cache_dir = Path(start.scratch_dir), Path(start.cache_dir)
    position.begin("load")
    device = usable_device(start.device, spec.workers.device)
    check_congestion_control(spec.network.congestion_control)
    keep_freed_memory()
    settle_numerics(spec.workers.threads, device)
    prepared = prepare(spec, Path.cwd() if start.bundle_sha256 else None, device)
    staging = staging_for(device)
    replica = Replica(prepared.model, spec.train.optimizer, staging, spec.train.unfreeze_at)
    if spec.train.compile:
        replica.model.compile()
    sampler = prepared.sampler
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
    task, built = build_anew(prepared.task, replica.model, spec)
    model, _ = settle_model(task, built, prepared.train, spec, CPU)
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
        microbatch_digest=preflight.microbatch_digest,
    )


def _failure(error: PsError, code: Path) -> Failure:
    """The error as the master stores it: the traceback apart, the preflight's table as messages. `code`: the directory
    to which the names of the user's files are relative."""
    checks = [PreflightCheck(**asdict(check)) for check in checks_of(error)]
    error.details.pop("checks", None)
    shown = error.details.pop("traceback", "")
    if not shown and error.__cause__ is not None:
        shown = user_traceback(error.__cause__)
    shown = relative_to(code, shown)
    if not isinstance(error, PreflightError):  # which has several
        error.details |= frame_details(shown)
    if position.shard >= 0:
        error.details["shard"] = str(position.shard)
    return Failure(
        error=detail_of(error), traceback=shown, checks=checks, step=position.step, committed=position.version
    )


if __name__ == "__main__":
    sys.exit(main())
