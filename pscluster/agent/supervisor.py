"""The processes of a node: reconciled with the newest assignment, watched, and ended with the agent."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Container, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pscluster.agent import metrics
from pscluster.agent.addresses import Interface, is_gone
from pscluster.agent.child import GracePeriods
from pscluster.agent.context import AgentContext
from pscluster.agent.process import LastSent, Process, wanted_device
from pscluster.agent.status import address_gone, not_started
from pscluster.agent.tasks import spawn
from pscluster.devices import device_priority
from pscluster.v1.agents_pb2 import AgentMessage, Assignment, ProcessState
from pscluster.v1.plan_pb2 import Credentials, Plan, ProcessSpec, Speed

WATCH_S = 0.25
AT_ONCE = GracePeriods(terminate_s=0.0, kill_s=0.0)
"""For a suspected process, which may not read orders any more."""
MAX_REMEMBERED = 10_000
"""Ids of processes that ran here and are never started again."""


class Supervisor:
    """Used from one loop, whose thread must outlive the processes."""

    def __init__(self, context: AgentContext, grace: GracePeriods | None = None) -> None:
        self._context = context
        self._grace = grace or GracePeriods()
        self._processes: dict[str, Process] = {}
        self._ever_ran: OrderedDict[str, None] = OrderedDict()
        self._num_started = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def apply(self, assignment: Assignment) -> None:
        """Start, end and update processes to match `assignment`; returns at once. Idempotent."""
        if self._closing:
            return
        self._context.copies.update_peers(assignment.depots)
        self._context.copies.forget(assignment.deleted_jobs)
        self._context.network.revocations.replace(assignment.revoked_serials)
        running = {id_: process.last_sent for id_, process in self._processes.items() if process.is_active}
        actions = reconcile(assignment.processes, running, self._ever_ran)
        for process_id in actions.stop:
            process = self._processes[process_id]
            self._spawn(process.end(AT_ONCE if process.is_suspected else self._grace))
        for spec in sorted(actions.start, key=_device_priority):
            self._num_started += 1
            self._ever_ran[spec.process_id] = None
            if len(self._ever_ran) > MAX_REMEMBERED:
                self._ever_ran.popitem(last=False)
            process = Process(spec, self._num_started, self._context)
            self._processes[spec.process_id] = process
            self._spawn(self._run(process))
        for process_id, plan in actions.forward:
            self._processes[process_id].forward(plan)
        for process_id, credentials in actions.renew:
            self._processes[process_id].renew(credentials)
        for spec in assignment.processes:
            if spec.process_id not in self._processes:
                # It has exited and is forgotten: a master with an older database assigns it again.
                self._context.emit(AgentMessage(status=not_started(spec.process_id, expected=True)))
        named = {spec.process_id for spec in assignment.processes}
        self._processes = {id_: p for id_, p in self._processes.items() if p.is_active or id_ in named}

    def relocate(self, depot_address: str, present: Collection[Interface]) -> None:
        """The node is at these addresses now. A partition that listens at none of them is reached by nobody: it is
        killed, and reported as lost; the master starts another, here or elsewhere."""
        self._context.copies.address = depot_address
        for process in self._processes.values():
            if process.is_active and process.data_host and is_gone(process.data_host, present):
                process.lose(address_gone(process.spec.process_id, process.data_host))

    def states(self) -> list[ProcessState]:
        """Every process that runs, or has exited and is still in the newest assignment."""
        return [process.state() for process in self._processes.values()]

    @property
    def is_empty(self) -> bool:
        """Whether no process runs or is about to."""
        return not any(process.is_active for process in self._processes.values())

    @property
    def bundles(self) -> frozenset[str]:
        """The bundles of all processes that run or are about to."""
        return frozenset(process.spec.bundle_sha256 for process in self._processes.values() if process.is_active)

    @property
    def jobs(self) -> frozenset[str]:
        """The jobs of all processes that run or are about to."""
        return frozenset(process.spec.job_id for process in self._processes.values() if process.is_active)

    async def wait_empty(self) -> None:
        """Wait until no process runs because the newest assignment names none."""
        while not self.is_empty:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    def speeds(self) -> dict[str, Speed]:
        """How fast the running trainers compute, by process id, as far as they have measured it."""
        return {id_: p.speed for id_, p in self._processes.items() if p.is_active and p.speed is not None}

    async def watch(self) -> None:
        """Report suspected processes; never returns."""
        loop = asyncio.get_running_loop()
        looked_s = loop.time()
        while True:
            await asyncio.sleep(WATCH_S)
            now_s = loop.time()
            # An agent that was itself stopped first reads the heartbeats that arrived meanwhile.
            if now_s - looked_s < 2 * WATCH_S:
                self.check_heartbeats(now_s)
            looked_s = now_s

    def check_heartbeats(self, now_s: float) -> None:
        """Report to the master each running process that has become suspected, or recovered, since the last check."""
        active = [process for process in self._processes.values() if process.is_active]
        metrics.PROCESSES.set(len(active))
        for process in active:
            process.check_heartbeat(now_s)

    async def close(self) -> None:
        """End every process and wait until each exit is reported. Later assignments are ignored."""
        self._closing = True
        await asyncio.gather(*(p.end(self._grace) for p in self._processes.values() if p.is_active))
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, process: Process) -> None:
        await process.run()
        await self._context.bundles.trim(self.bundles)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        spawn(self._tasks, work, "supervising a process failed")


def _device_priority(spec: ProcessSpec) -> int:
    try:
        return device_priority(wanted_device(spec))
    except ValueError:
        return 0  # its start fails with the reason


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What an agent does to match an assignment; no process that is started or stopped is in another list. Its text
    leaves the processes' keys out."""

    start: tuple[ProcessSpec, ...] = field(default=(), repr=False)
    stop: tuple[str, ...] = ()
    forward: tuple[tuple[str, Plan], ...] = field(default=(), repr=False)
    renew: tuple[tuple[str, Credentials], ...] = field(default=(), repr=False)


def reconcile(desired: Iterable[ProcessSpec], running: Mapping[str, LastSent], ever_ran: Container[str]) -> Actions:
    """The actions that turn `running` into `desired`. Pure; after applying them there are none left.

    `running`: what was sent last to each process that runs, or is being started. `ever_ran`: all ids started here
    before; none is started twice, because the master decides on a new attempt."""
    wanted: dict[str, ProcessSpec] = {}
    for spec in desired:
        wanted.setdefault(spec.process_id, spec)
    return Actions(
        start=tuple(spec for id_, spec in wanted.items() if id_ not in running and id_ not in ever_ran),
        stop=tuple(id_ for id_ in running if id_ not in wanted),
        forward=tuple(
            (id_, wanted[id_].plan)
            for id_, held in running.items()
            if id_ in wanted and _is_news(wanted[id_], held.plan)
        ),
        renew=tuple(
            (id_, wanted[id_].credentials)
            for id_, held in running.items()
            if id_ in wanted and wanted[id_].HasField("credentials") and wanted[id_].credentials != held.credentials
        ),
    )


def _is_news(spec: ProcessSpec, held: Plan | None) -> bool:
    """Whether a plan is newer. It never goes back a generation: a late message must not undo a newer plan."""
    if not spec.HasField("plan"):
        return False
    return held is None or (spec.plan.generation >= held.generation and spec.plan != held)
