"""The processes of a node: made what the newest assignment says, watched, ended with the agent."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

import structlog

from pscluster.agent import metrics
from pscluster.agent.child import Patience
from pscluster.agent.process import Process, Site, wanted_device
from pscluster.agent.reconcile import reconcile
from pscluster.devices import modesty
from pscluster.v1.agents_pb2 import Assignment, ProcessState
from pscluster.v1.plan_pb2 import ProcessSpec

WATCH_S = 1.0
SILENCE_S = 10.0
"""A living process that beat once and then not for so long is reported in log and metrics."""
MAX_REMEMBERED = 10_000
"""Ids of processes that ran here and are never started again."""

_log = structlog.get_logger(__name__)


def is_silent(now: float, beat_at: float | None, silence_s: float = SILENCE_S) -> bool:
    """Whether a process should have beaten by `now`; one that never did is still loading."""
    return beat_at is not None and now - beat_at > silence_s


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
        living = {id_: process.plan for id_, process in self._processes.items() if process.living}
        actions = reconcile(assignment.processes, living, self._ever_ran)
        for process_id in actions.stop:
            self._spawn(self._processes[process_id].end(self._patience))
        for spec in sorted(actions.start, key=_modesty):
            self._num_started += 1
            self._remember(spec.process_id)
            process = Process(spec, self._num_started, self._site)
            self._processes[spec.process_id] = process
            self._spawn(self._run(process))
        for process_id, plan in actions.forward:
            self._processes[process_id].forward(plan)
        self._forget_ended({spec.process_id for spec in assignment.processes})

    def states(self) -> list[ProcessState]:
        """Every process that lives, or ended and is still named by the newest assignment."""
        return [process.state() for process in self._processes.values()]

    async def watch(self) -> None:
        """Look for processes that live and no longer beat, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            self.check_beats(loop.time())
            await asyncio.sleep(WATCH_S)

    def check_beats(self, now: float) -> None:
        """Log and count each process that fell silent since the last check; the decision is the master's."""
        living = [process for process in self._processes.values() if process.living]
        metrics.PROCESSES.set(len(living))
        for process in living:
            silent = is_silent(now, process.beat_at)
            if silent and not process.silent:
                metrics.SILENCES.inc()
                _log.warning("a process lives but does not beat", process_id=process.spec.process_id)
            process.silent = silent

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


def _modesty(spec: ProcessSpec) -> int:
    try:
        return modesty(wanted_device(spec))
    except ValueError:
        return 0  # it will not start, and say why
