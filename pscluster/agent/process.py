"""One process's whole life on a node: what it needs fetched, the process started, what it says relayed, its exit
told."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from pscluster.agent import metrics, resources
from pscluster.agent.bundles import BundleCache
from pscluster.agent.child import Child, Ended, Patience
from pscluster.agent.copies import Copies
from pscluster.agent.directories import AgentDirectories
from pscluster.agent.launch import BUNDLE_DIR, SOCKET_DIR
from pscluster.agent.output import Backlog
from pscluster.agent.resources import DeviceLedger
from pscluster.agent.status import LOADING_SILENCE_S, NOT_STARTED, SILENCE_S, Exit, LastHeartbeat, classify, detail_of
from pscluster.devices import AUTO
from pscluster.errors import InternalError, PsError, StorageError, UnreachableError
from pscluster.v1.agents_pb2 import AgentMessage, LogLine, ProcessEvent, ProcessState, ProcessStatus
from pscluster.v1.plan_pb2 import Failure, Plan, ProcessReport, ProcessSpec, Speed, Unreached
from pscluster.wire.backoff import delay_s

FLUSH_S = 0.2
"""How long a line may wait for others to travel with."""
MAX_UNACKED_LOG_BYTES = 4 * 1024 * 1024
"""While more than this waits for the master, lines stay in the process's own backlog and age there."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Site:
    """What all processes of an agent share. `emit` takes a message for the master; `log_bytes` is how much
    output it has not taken yet."""

    command: tuple[str, ...]
    environ: Mapping[str, str]
    directories: AgentDirectories
    bundles: BundleCache
    devices: DeviceLedger
    copies: Copies
    metrics: metrics.ProcessMetrics
    emit: Callable[[AgentMessage], None]
    log_bytes: Callable[[], int]


class Process:
    """Named by a ProcessSpec; started by `run`, once. Belongs to the agent's loop."""

    def __init__(self, spec: ProcessSpec, number: int, site: Site) -> None:
        """`number` is unique within the agent's life: it names the process's directories."""
        self.spec = spec
        self.plan: Plan | None = spec.plan if spec.HasField("plan") else None
        self.heard: LastHeartbeat | None = None
        """Its last beat; before the first, its start."""
        self.speed: Speed | None = None
        """How fast a trainer computes, as its last beat said."""
        self._site = site
        self._log = _log.bind(process_id=spec.process_id)
        self._status = ProcessStatus(process_id=spec.process_id)
        self._ready: ProcessReport | None = None
        self._failure: Failure | None = None
        self._child: Child | None = None
        self._preparation: asyncio.Task[Path] | None = None
        self._ending = False
        self._copies = False  # its snapshots are this node's own, and are copied to a second one
        self._backlog = Backlog()
        self._flush: asyncio.TimerHandle | None = None
        self._sockets = site.directories.runtime / f"p{number}"
        self._scratch = site.directories.jobs / f"p{number}"

    @property
    def living(self) -> bool:
        """It runs, or is about to."""
        return self._status.phase != ProcessStatus.PHASE_EXITED

    def state(self) -> ProcessState:
        """What a restarted master learns of it."""
        generation = self.plan.generation if self.plan is not None else 0
        return ProcessState(status=self._status, ready=self._ready, generation=generation)

    async def run(self) -> None:
        """Fetch, start, wait and tell the exit. Whatever fails becomes an exited status."""
        kills_before = resources.oom_kills()
        problem: PsError | None = None
        try:
            self._child = await self._started()
        except Exception as error:  # whatever it is: nobody else would tell what became of this process
            problem = _named(error)
        if self._child is None:
            self._conclude(self._not_started(problem))
        else:
            self._tell_running(self._child)
            ended = await self._child.wait()
            self._conclude(self._classify(self._child.pid, ended, resources.oom_kills() - kills_before))
        await asyncio.to_thread(self._remove_directories)

    async def _started(self) -> Child | None:
        """None: it was told to end before it could start."""
        self._preparation = asyncio.create_task(self._prepare())
        await asyncio.wait({self._preparation})
        if self._preparation.cancelled():
            return None
        directory = self._preparation.result()
        # Also when the order came after the preparation was done, but before we were woken.
        return None if self._ending else self._start(directory)

    async def end(self, patience: Patience) -> None:
        """Make it go; returns when the process is gone. `run` ends soon after. Safe to repeat."""
        self._ending = True
        self._site.devices.leaving(self.spec.process_id)
        if self._child is not None:
            await self._child.end(patience)
        elif self._preparation is not None:
            self._preparation.cancel()

    def forward(self, plan: Plan) -> None:
        """Hand over a newer plan; one that comes before the start goes with it."""
        before, self.plan = self.plan, plan
        if self._child is None:
            self.spec.plan.CopyFrom(plan)
        elif self._copies and self._site.copies.must_bring(self.spec, before, plan):
            self._site.copies.bring(self.spec, plan, self._child.forward, self._say)
        else:
            self._child.forward(plan)

    @property
    def silence_s(self) -> float:
        """How long nothing may be heard of it."""
        return LOADING_SILENCE_S if self._ready is None else SILENCE_S[self.spec.kind]

    @property
    def suspicion(self) -> ProcessStatus.Suspicion:
        """What the master was last told of it."""
        return self._status.suspicion

    @property
    def unreached(self) -> Unreached | None:
        """What the master was last told that it cannot reach."""
        return self._status.unreached if self._status.HasField("unreached") else None

    def suspect(self, suspicion: ProcessStatus.Suspicion, unreached: Unreached | None) -> None:
        """Tell the master how the living process looks, and whom it cannot reach."""
        self._status.suspicion = suspicion
        self._status.ClearField("unreached")
        if unreached is not None:
            self._status.unreached.CopyFrom(unreached)
        self._site.emit(AgentMessage(status=self._status))

    # What the child says (Listener).

    def reported(self, report: ProcessReport) -> None:
        body = report.WhichOneof("body")
        if body == "counters":
            self._site.metrics.keep(self.spec, report.counters)
            return
        if body == "beat":
            now_s = asyncio.get_running_loop().time()
            beat = report.beat
            unreached = beat.unreached if beat.HasField("unreached") else None
            self.heard = LastHeartbeat(at_s=now_s, busy_s=beat.busy_s, typical_s=beat.typical_s, unreached=unreached)
            self.speed = beat.speed if beat.HasField("speed") else None
            return
        if body == "snapshot_part" and self._copies:
            self._site.copies.copy(self.spec, self.plan, report, self._say, self._settled)
            return
        if body in ("trainer_ready", "partition_ready"):
            self._ready = report
            if self.heard is not None:  # this is a sign of life, too: beats may have yet to begin
                self.heard = replace(self.heard, at_s=asyncio.get_running_loop().time())
        if body == "failure":
            self._failure = report.failure
        self._send_lines(final=True)
        self._say(report)

    def _say(self, report: ProcessReport) -> None:
        self._site.emit(AgentMessage(event=ProcessEvent(process_id=self.spec.process_id, report=report)))

    def _settled(self, path: str) -> None:
        if self._child is not None:
            self._child.settle(path)

    def wrote(self, stream: str, text: str) -> None:
        dropped = self._backlog.add(LogLine(time_s=time.time(), stream=stream, text=text))
        metrics.LINES_DROPPED.inc(dropped)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(FLUSH_S, self._send_lines)

    def _send_lines(self, final: bool = False) -> None:
        """`final`: something that must come after these lines follows, so they cannot wait."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        while self._backlog and (final or self._site.log_bytes() < MAX_UNACKED_LOG_BYTES):
            self._site.emit(AgentMessage(log=self._backlog.take(self.spec.process_id)))
        if self._backlog:
            self._flush = asyncio.get_running_loop().call_later(FLUSH_S, self._send_lines)

    # Start.

    async def _prepare(self) -> Path:
        for directory in (self._sockets, self._scratch):
            try:
                directory.mkdir(mode=0o700)
            except OSError as error:
                raise StorageError(f"cannot create {directory}: {error.strerror}") from None
        if self.spec.kind == ProcessSpec.KIND_TRAINER:
            self.spec.device = await self._site.devices.claim(self.spec.process_id, wanted_device(self.spec))
        self._copies = self._site.copies.settle(self.spec)
        if self._copies:
            await self._site.copies.obtain(self.spec, lambda: self.spec.plan, self._say)
        return await self._bundle() if self.spec.bundle_sha256 else self._scratch

    async def _bundle(self) -> Path:
        """Where the job's code is, once it is there."""
        failures = 0
        while True:
            try:
                return await self._site.bundles.obtain(self.spec.bundle_sha256)
            except UnreachableError as error:
                failures += 1
                if failures == 1:
                    self._log.warning("waits for its code bundle", cause=error.cause)
            await asyncio.sleep(delay_s(failures, random.random()))

    def _start(self, directory: Path) -> Child:
        threads = str(num_threads(self.spec))
        environment = {
            **self._site.environ,
            SOCKET_DIR: str(self._sockets),
            BUNDLE_DIR: str(directory),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_DYNAMIC": "false",
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        return Child.start(self.spec, self._site.command, directory, environment, self)

    def _tell_running(self, child: Child) -> None:
        metrics.STARTED.inc()
        self._status.phase = ProcessStatus.PHASE_RUNNING
        self._status.pid = child.pid
        self.heard = LastHeartbeat(at_s=asyncio.get_running_loop().time())
        self._site.emit(AgentMessage(status=self._status))
        self._log.info("process started", pid=child.pid)

    # End.

    def _not_started(self, error: PsError | None) -> ProcessStatus:
        status = ProcessStatus(
            process_id=self.spec.process_id,
            phase=ProcessStatus.PHASE_EXITED,
            exit_code=NOT_STARTED,
            expected=self._ending,
        )
        if error is not None:
            status.error.CopyFrom(detail_of(error))
        return status

    def _classify(self, pid: int, ended: Ended, oom_kills: int) -> ProcessStatus:
        facts = Exit(
            returncode=ended.returncode,
            expected=ended.expected,
            oom_kills=oom_kills,
            failure=self._failure,
            last_words=ended.last_words,
        )
        return classify(self.spec.process_id, pid, facts)

    def _conclude(self, status: ProcessStatus) -> None:
        self._status = status
        self._send_lines(final=True)
        self._site.devices.release(self.spec.process_id)
        self._site.copies.leave(self.spec.process_id)
        self._site.metrics.drop(self.spec.process_id)
        metrics.EXITS.labels(cause=_cause(status)).inc()
        self._site.emit(AgentMessage(status=status))
        self._log.info(
            "process ended",
            exit_code=status.exit_code,
            signal=status.signal,
            expected=status.expected,
            out_of_memory=status.out_of_memory,
            cause=status.error.cause,
        )

    def _remove_directories(self) -> None:
        for directory in (self._sockets, self._scratch):
            shutil.rmtree(directory, ignore_errors=True)


def num_threads(spec: ProcessSpec) -> int:
    """Intra-op threads of a process: the spec's for a trainer, 1 for a partition."""
    return int(_workers(spec).get("threads", 1))


def wanted_device(spec: ProcessSpec) -> str:
    """The spec's `workers.device`."""
    return str(_workers(spec).get("device", AUTO))


def _workers(spec: ProcessSpec) -> Mapping[str, Any]:
    """The section of the job's spec that concerns trainers; empty for a partition. Raises ValueError."""
    if spec.kind != ProcessSpec.KIND_TRAINER or not spec.spec_json:
        return {}
    section: Mapping[str, Any] = json.loads(spec.spec_json).get("workers", {})
    return section


def _named(error: Exception) -> PsError:
    """Why a process could not be started."""
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
