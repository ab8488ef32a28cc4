"""One process's life on a node: its inputs fetched, the process started, its reports relayed, its exit reported."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from pscluster.agent import metrics, resources
from pscluster.agent.child import Child, GracePeriods
from pscluster.agent.context import AgentContext
from pscluster.agent.launch import BUNDLE_DIR, SOCKET_DIR
from pscluster.agent.position import last_position, stack_of
from pscluster.agent.report_queue import Backlog
from pscluster.agent.status import (
    LOADING_SILENCE_S,
    NONE,
    NOT_STARTED,
    SILENCE_S,
    SUSPICION_NAMES,
    LastHeartbeat,
    classify,
    not_started,
    suspicion_of,
)
from pscluster.devices import AUTO
from pscluster.errors import InternalError, PsError, StorageError, UnreachableError
from pscluster.v1.agents_pb2 import AgentMessage, LogLine, ProcessEvent, ProcessState, ProcessStatus
from pscluster.v1.plan_pb2 import Credentials, Failure, Plan, ProcessReport, ProcessSpec, Speed
from pscluster.wire.backoff import delay_s

FLUSH_S = 0.2
"""How long a line may wait for others to be sent with."""
MAX_UNACKED_LOG_BYTES = 4 * 1024 * 1024
"""While more than this waits for the master, lines stay in the process's backlog, where the oldest are dropped."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class LastSent:
    """What a process, or one that is being started, was sent last; None: nothing yet."""

    plan: Plan | None = None
    credentials: Credentials | None = field(default=None, repr=False)


class Process:
    """The process of one ProcessSpec; started by `run`, once. Used from the agent's loop."""

    def __init__(self, spec: ProcessSpec, number: int, context: AgentContext) -> None:
        """`number` is unique within the agent's life, and names the process's directories."""
        self.spec = spec
        self.plan: Plan | None = spec.plan if spec.HasField("plan") else None
        self.last_heartbeat: LastHeartbeat | None = None
        """The last heartbeat; before the first, the start."""
        self._context = context
        self._log = _log.bind(process_id=spec.process_id)
        self._status = ProcessStatus(process_id=spec.process_id)
        self._ready: ProcessReport | None = None
        self._failure: Failure | None = None
        self._lost: PsError | None = None
        self._child: Child | None = None
        self._preparation: asyncio.Task[None] | None = None
        self._ending = False
        self._copies = False  # its snapshots are in this node's own store, and are copied to a second node
        self._backlog = Backlog()
        self._flush: asyncio.TimerHandle | None = None
        self._sockets = context.directories.runtime / f"p{number}"
        self._directory = context.directories.jobs / f"p{number}"  # where it is started

    @property
    def is_active(self) -> bool:
        """Whether it runs, or is about to."""
        return self._status.phase != ProcessStatus.PHASE_EXITED

    @property
    def last_sent(self) -> LastSent:
        credentials = self.spec.credentials if self.spec.HasField("credentials") else None
        return LastSent(plan=self.plan, credentials=credentials)

    @property
    def data_host(self) -> str:
        """Where a partition listens for other hosts; empty: it does not."""
        return self.spec.data_host if self._child is not None else ""

    @property
    def speed(self) -> Speed | None:
        """How fast a trainer computes, by its last heartbeat."""
        return _optional(self.last_heartbeat.beat, "speed") if self.last_heartbeat is not None else None

    def state(self) -> ProcessState:
        """What a Hello reports of it to a restarted master."""
        generation = self.plan.generation if self.plan is not None else 0
        return ProcessState(status=self._status, ready=self._ready, generation=generation)

    async def run(self) -> None:
        """Fetch, start, wait and report the exit. Every failure becomes an exited status."""
        kills_before = resources.oom_kills()
        problem: PsError | None = None
        try:
            self._child = await self._started()
        except Exception as error:  # of any kind: nothing else reports what became of this process
            problem = _start_error(error)
        if self._child is None:
            self._report_exit(not_started(self.spec.process_id, problem, expected=self._ending))
        else:
            self._report_running(self._child)
            seen = await self._child.wait()
            kills = resources.oom_kills() - kills_before
            seen = replace(seen, oom_kills=kills, failure=self._failure, lost=self._lost)
            if self.spec.kind == ProcessSpec.KIND_TRAINER:
                seen = replace(seen, position=await asyncio.to_thread(last_position, self._sockets, self._directory))
                for line in stack_of(self._sockets).splitlines():
                    self._handle_line("stderr", line)
            self._report_exit(classify(self.spec.process_id, self._child.pid, seen))
        for directory in (self._sockets, self._directory):
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def _started(self) -> Child | None:
        """None: it was ended before it could start."""
        self._preparation = asyncio.create_task(self._prepare())
        await asyncio.wait({self._preparation})
        if self._preparation.cancelled():
            return None
        self._preparation.result()
        # Also when it was ended after the preparation, but before this task resumed.
        return None if self._ending else self._start()

    async def end(self, grace: GracePeriods) -> None:
        """End it; returns when the process has exited. `run` returns soon after. Safe to repeat."""
        self._ending = True
        self._context.devices.leaving(self.spec.process_id)
        if self._child is not None:
            await self._child.end(grace)
        elif self._preparation is not None:
            self._preparation.cancel()

    def forward(self, plan: Plan) -> None:
        """Send a newer plan; one that arrives before the start is sent with it."""
        before, self.plan = self.plan, plan
        if self._child is None:
            self.spec.plan.CopyFrom(plan)
        elif self._copies and self._context.copies.must_fetch(self.spec, before, plan):
            self._context.copies.fetch(self.spec, plan, self._child.forward, self._emit_event)
        else:
            self._child.forward(plan)

    def renew(self, credentials: Credentials) -> None:
        """Send newer credentials; those that arrive before the start are sent with it."""
        self.spec.credentials.CopyFrom(credentials)
        if self._child is not None:
            self._child.renew(credentials)

    def lose(self, error: PsError) -> None:
        """Kill a running process, which cannot do its work any more; its exit is reported with `error`. Safe to
        repeat."""
        if self._child is not None and not self._ending:
            self._lost = error
            self._log.warning("a process is of no use any more", cause=error.cause)
            self._child.kill()

    @property
    def is_suspected(self) -> bool:
        """Whether it was reported to the master as silent or stalled."""
        return self._status.suspicion != NONE

    def check_heartbeat(self, now_s: float) -> None:
        """Report to the master if the running process has become suspected, or recovered, since the last check, or
        reaches other partitions."""
        silence_s = LOADING_SILENCE_S if self._ready is None else SILENCE_S[self.spec.kind]
        found = suspicion_of(now_s, self.last_heartbeat, silence_s)
        unreached = _optional(self.last_heartbeat.beat, "unreached") if self.last_heartbeat is not None else None
        before, reported = self._status.suspicion, _optional(self._status, "unreached")
        if (found, unreached) == (before, reported):
            return
        if found not in (before, NONE):
            metrics.SUSPICIONS.labels(kind=SUSPICION_NAMES[found]).inc()
            self._log.warning(f"a process is {SUSPICION_NAMES[found]}")
        elif found != before:
            self._log.info("a process recovered")
        if unreached is not None and reported is None:
            metrics.SUSPICIONS.labels(kind="cut off").inc()
            why = {"partitions": list(unreached.partitions), "reasons": list(unreached.reasons)}
            self._log.warning("a process cannot reach partitions", **why)
        elif unreached is None and reported is not None:
            self._log.info("a process reaches all partitions again")
        self._status.suspicion = found
        self._status.ClearField("unreached")
        if unreached is not None:
            self._status.unreached.CopyFrom(unreached)
        self._context.emit(AgentMessage(status=self._status))

    # Reports and output of the child.

    def _handle_report(self, report: ProcessReport) -> None:
        body = report.WhichOneof("body")
        if body == "counters":
            self._context.metrics.keep(self.spec, report.counters)
            return
        if body == "beat":
            self.last_heartbeat = LastHeartbeat(at_s=asyncio.get_running_loop().time(), beat=report.beat)
            return
        if body == "snapshot_part" and self._copies:
            self._context.copies.copy(self.spec, self.plan, report, self._emit_event, self._part_settled)
            return
        if body in ("trainer_ready", "partition_ready"):
            self._ready = report
            if self.last_heartbeat is not None:  # also a sign of life: heartbeats may not have begun
                self.last_heartbeat = replace(self.last_heartbeat, at_s=asyncio.get_running_loop().time())
        if body == "failure":
            self._failure = report.failure
        self._send_lines(final=True)
        self._emit_event(report)

    def _emit_event(self, report: ProcessReport) -> None:
        self._context.emit(AgentMessage(event=ProcessEvent(process_id=self.spec.process_id, report=report)))

    def _part_settled(self, path: str) -> None:
        if self._child is not None:
            self._child.settle(path)

    def _handle_line(self, stream: str, text: str) -> None:
        dropped = self._backlog.add(LogLine(time_s=time.time(), stream=stream, text=text))
        metrics.LINES_DROPPED.inc(dropped)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(FLUSH_S, self._send_lines)

    def _send_lines(self, final: bool = False) -> None:
        """`final`: a message that must come after these lines follows, so send all."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        while self._backlog and (final or self._context.log_bytes() < MAX_UNACKED_LOG_BYTES):
            self._context.emit(AgentMessage(log=self._backlog.take(self.spec.process_id)))
        if self._backlog:
            self._flush = asyncio.get_running_loop().call_later(FLUSH_S, self._send_lines)

    # Start.

    async def _prepare(self) -> None:
        is_trainer = self.spec.kind == ProcessSpec.KIND_TRAINER
        _make(self._sockets)
        if is_trainer:
            # First, before anything waits: processes claim in the order in which they were started.
            self.spec.device = await self._context.devices.claim(self.spec.process_id, wanted_device(self.spec))
            scratch = self._context.directories.scratch / self.spec.job_id
            _make(scratch, exist_ok=True)
            await self._give(scratch)
            self.spec.scratch_dir, self.spec.cache_dir = str(scratch), str(self._context.directories.cache)
        self._copies = self._context.copies.use_own_store(self.spec)
        if self._copies:
            await self._context.copies.wait_for_part(self.spec, lambda: self.spec.plan, self._emit_event)
        if self.spec.kind == ProcessSpec.KIND_PARTITION and self.spec.HasField("credentials"):
            await self._open_to_hosts()
        if is_trainer and self.spec.bundle_sha256:
            await self._unpack_bundle()
        else:
            _make(self._directory)
        if is_trainer:
            await self._give(self._sockets)
            await self._give(self._directory)
        else:
            self._context.isolation.admit(self._sockets)

    async def _give(self, directory: Path) -> None:
        await asyncio.to_thread(self._context.isolation.give, directory)

    async def _open_to_hosts(self) -> None:
        """Have a partition listen for other hosts, too. Never without certificates."""
        network = self._context.network
        self.spec.data_host = await asyncio.to_thread(network.address.locate)
        if (ports := network.data_ports) is not None:
            self.spec.data_port_first, self.spec.data_port_last = ports.first, ports.last

    async def _unpack_bundle(self) -> None:
        """Write the job's code to a directory of this process alone. Waits for the master if it must be downloaded."""
        failures = 0
        while True:
            try:
                await self._context.bundles.unpack(self.spec.bundle_sha256, self._directory)
                return
            except UnreachableError as error:
                failures += 1
                if failures == 1:
                    self._log.warning("waiting for the code bundle", cause=error.cause)
            await asyncio.sleep(delay_s(failures, random.random()))

    def _start(self) -> Child:
        threads = str(num_threads(self.spec))
        environment = {
            **self._context.environ,
            SOCKET_DIR: str(self._sockets),
            BUNDLE_DIR: str(self._directory),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_DYNAMIC": "false",
            "PYTHONHASHSEED": "0",  # or a set of words would have another order in each process
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        if self.spec.kind == ProcessSpec.KIND_TRAINER:
            environment |= self._context.isolation.environment()
        context = self._context
        return Child.start(
            self.spec, context.command, self._directory, environment, self._handle_report, self._handle_line
        )

    def _report_running(self, child: Child) -> None:
        metrics.STARTED.inc()
        self._status.phase = ProcessStatus.PHASE_RUNNING
        self._status.pid = child.pid
        self.last_heartbeat = LastHeartbeat(at_s=asyncio.get_running_loop().time())
        self._context.emit(AgentMessage(status=self._status))
        self._log.info("process started", pid=child.pid)

    # End.

    def _report_exit(self, status: ProcessStatus) -> None:
        self._status = status
        self._send_lines(final=True)
        self._context.devices.release(self.spec.process_id)
        self._context.copies.cancel_fetch(self.spec.process_id)
        self._context.metrics.drop(self.spec.process_id)
        metrics.EXITS.labels(cause=_cause(status)).inc()
        self._context.emit(AgentMessage(status=status))
        self._log.info(
            "process ended",
            exit_code=status.exit_code,
            signal=status.signal,
            expected=status.expected,
            out_of_memory=status.out_of_memory,
            cause=status.error.cause,
        )


def _make(directory: Path, *, exist_ok: bool = False) -> None:
    try:
        directory.mkdir(mode=0o700, exist_ok=exist_ok)
    except OSError as error:
        raise StorageError(f"cannot create {directory}: {error.strerror}") from None


def num_threads(spec: ProcessSpec) -> int:
    """Intra-op threads of a process: the spec's for a trainer, 1 for a partition."""
    return int(_workers(spec).get("threads", 1))


def wanted_device(spec: ProcessSpec) -> str:
    return str(_workers(spec).get("device", AUTO))


def _workers(spec: ProcessSpec) -> Mapping[str, Any]:
    """The `workers` section of a trainer's job spec; empty for a partition. Raises ValueError."""
    if spec.kind != ProcessSpec.KIND_TRAINER or not spec.spec_json:
        return {}
    section: Mapping[str, Any] = json.loads(spec.spec_json).get("workers", {})
    return section


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _start_error(error: Exception) -> PsError:
    if isinstance(error, PsError):
        return error
    if isinstance(error, OSError):
        return StorageError(f"cannot start a process: {error}")
    return InternalError(f"cannot start a process: {error!r}")


def _cause(status: ProcessStatus) -> str:
    """The label under which an exit is counted; one of metrics.EXIT_CAUSES."""
    if status.expected:
        return "expected"
    if status.out_of_memory:
        return "memory"
    if status.signal:
        return "signal"
    if status.exit_code == NOT_STARTED and not status.pid:
        return "not_started"
    return "code" if status.exit_code else "clean"
