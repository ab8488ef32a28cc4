"""The processes of a node: made what the newest assignment says, watched, ended with the agent."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Container, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from pscluster.agent import metrics
from pscluster.agent.child import Patience
from pscluster.agent.process import Process, Site, wanted_device
from pscluster.agent.status import NONE, NOT_STARTED, WORDS, suspicion_of
from pscluster.devices import device_priority
from pscluster.v1.agents_pb2 import AgentMessage, Assignment, ProcessState, ProcessStatus
from pscluster.v1.plan_pb2 import Plan, ProcessSpec, Speed, Unreached

WATCH_S = 0.25
AT_ONCE = Patience(terminate_s=0.0, kill_s=0.0)
"""For a process that does not listen any more."""
MAX_REMEMBERED = 10_000
"""Ids of processes that ran here and are never started again."""

_log = structlog.get_logger(__name__)


class Supervisor:
    """Belongs to one loop, whose thread must outlive the processes."""

    def __init__(self, site: Site, patience: Patience | None = None) -> None:
        self._site = site
        self._patience = patience or Patience()
        self._processes: dict[str, Process] = {}
        self._ever_ran: OrderedDict[str, None] = OrderedDict()
        self._num_started = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def apply(self, assignment: Assignment) -> None:
        """Start, end and inform processes until they are what `assignment` names; returns at once. Idempotent."""
        if self._closing:
            return
        self._site.copies.meet(assignment.depots)
        self._site.copies.forget(assignment.deleted_jobs)
        living = {id_: process.plan for id_, process in self._processes.items() if process.living}
        actions = reconcile(assignment.processes, living, self._ever_ran)
        for process_id in actions.stop:
            process = self._processes[process_id]
            self._spawn(process.end(AT_ONCE if process.suspicion else self._patience))
        for spec in sorted(actions.start, key=_device_priority):
            self._num_started += 1
            self._remember(spec.process_id)
            process = Process(spec, self._num_started, self._site)
            self._processes[spec.process_id] = process
            self._spawn(self._run(process))
        for process_id, plan in actions.forward:
            self._processes[process_id].forward(plan)
        for spec in assignment.processes:
            if spec.process_id not in self._processes:
                self._site.emit(AgentMessage(status=_over(spec.process_id)))
        self._forget_ended({spec.process_id for spec in assignment.processes})

    def states(self) -> list[ProcessState]:
        """Every process that lives, or ended and is still named by the newest assignment."""
        return [process.state() for process in self._processes.values()]

    @property
    def is_empty(self) -> bool:
        """No process runs, or is about to."""
        return not any(process.living for process in self._processes.values())

    async def emptied(self) -> None:
        """Wait until no process runs any more because none is wanted here."""
        while not self.is_empty:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    def speeds(self) -> dict[str, Speed]:
        """How fast the living trainers compute that have measured it, by process id."""
        return {id_: p.speed for id_, p in self._processes.items() if p.living and p.speed is not None}

    async def watch(self) -> None:
        """Look for processes that live and do not get on, for ever."""
        loop = asyncio.get_running_loop()
        looked_s = loop.time()
        while True:
            await asyncio.sleep(WATCH_S)
            now_s = loop.time()
            # An agent that was itself stopped first reads what was said meanwhile.
            if now_s - looked_s < 2 * WATCH_S:
                self.check_beats(now_s)
            looked_s = now_s

    def check_beats(self, now_s: float) -> None:
        """Tell the master of each process that is suspected since the last check, or is no longer; it decides."""
        living = [process for process in self._processes.values() if process.living]
        metrics.PROCESSES.set(len(living))
        for process in living:
            found = suspicion_of(now_s, process.heard, process.silence_s)
            unreached = process.heard.unreached if process.heard is not None else None
            if (found, unreached) != (process.suspicion, process.unreached):
                _note(process, found, unreached)
                process.suspect(found, unreached)

    async def close(self) -> None:
        """End every process and wait until each exit was told. No assignment counts any more."""
        self._closing = True
        await asyncio.gather(*(p.end(self._patience) for p in self._processes.values() if p.living))
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, process: Process) -> None:
        await process.run()
        in_use = {p.spec.bundle_sha256 for p in self._processes.values() if p.living}
        await self._site.bundles.trim(in_use)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("supervising a process failed", exc_info=task.exception())

    def _remember(self, process_id: str) -> None:
        self._ever_ran[process_id] = None
        if len(self._ever_ran) > MAX_REMEMBERED:
            self._ever_ran.popitem(last=False)

    def _forget_ended(self, named: set[str]) -> None:
        for process_id in [id_ for id_, p in self._processes.items() if not p.living and id_ not in named]:
            del self._processes[process_id]


def _over(process_id: str) -> ProcessStatus:
    """Of a process that ended here and was forgotten: a master whose database is an older one asks for it again."""
    return ProcessStatus(process_id=process_id, phase=ProcessStatus.PHASE_EXITED, exit_code=NOT_STARTED, expected=True)


def _note(process: Process, suspicion: ProcessStatus.Suspicion, unreached: Unreached | None) -> None:
    """Say, and count, what has changed about a living process."""
    log = _log.bind(process_id=process.spec.process_id)
    if suspicion not in (process.suspicion, NONE):
        metrics.SUSPICIONS.labels(kind=WORDS[suspicion]).inc()
        log.warning(f"a process is {WORDS[suspicion]}")
    elif suspicion != process.suspicion:
        log.info("a process gets on again")
    if unreached is not None and process.unreached is None:
        metrics.SUSPICIONS.labels(kind="cut off").inc()
        log.warning("a process cannot reach partitions", partitions=list(unreached.partitions))
    elif unreached is None and process.unreached is not None:
        log.info("a process reaches every partition again")


def _device_priority(spec: ProcessSpec) -> int:
    try:
        return device_priority(wanted_device(spec))
    except ValueError:
        return 0  # it will not start, and say why


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What an agent does to become what the assignment says; the three lists name disjoint processes."""

    start: tuple[ProcessSpec, ...] = ()
    stop: tuple[str, ...] = ()
    forward: tuple[tuple[str, Plan], ...] = ()


def reconcile(desired: Iterable[ProcessSpec], running: Mapping[str, Plan | None], ever_ran: Container[str]) -> Actions:
    """The actions that make `running` what is `desired`.

    `running` maps the process ids that live (or are being started) to the newest plan handed to each, None
    before the first. `ever_ran` holds every id started here before, whatever became of it: none is started
    twice, because a new attempt is the master's to decide. Applying the actions and asking again gives none.
    """
    wanted: dict[str, ProcessSpec] = {}
    for spec in desired:
        wanted.setdefault(spec.process_id, spec)
    return Actions(
        start=tuple(spec for id_, spec in wanted.items() if id_ not in running and id_ not in ever_ran),
        stop=tuple(id_ for id_ in running if id_ not in wanted),
        forward=tuple(
            (id_, wanted[id_].plan) for id_, held in running.items() if id_ in wanted and _is_news(wanted[id_], held)
        ),
    )


def _is_news(spec: ProcessSpec, held: Plan | None) -> bool:
    """A plan never goes back to an older generation: a late message must not undo a newer one."""
    if not spec.HasField("plan"):
        return False
    return held is None or (spec.plan.generation >= held.generation and spec.plan != held)
