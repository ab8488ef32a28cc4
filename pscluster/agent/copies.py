"""A server node whose disk is its own: each snapshot part goes to a second node before the master hears of it, and
comes from one that has it before a partition is told to restore it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from pscluster.agent import depot
from pscluster.agent.status import detail_of
from pscluster.errors import (
    DamagedError,
    FrameError,
    InternalError,
    NotFoundError,
    PsError,
    StorageError,
    UnreachableError,
)
from pscluster.storage.directory import DirectoryStore
from pscluster.v1.agents_pb2 import DepotAddress
from pscluster.v1.depot_pb2 import TakePartRequest
from pscluster.v1.plan_pb2 import Plan, ProcessReport, ProcessSpec, SnapshotPart
from pscluster.v1.plan_pb2 import Warning as WarningMessage
from pscluster.wire.backoff import delay_s

Say = Callable[[ProcessReport], None]
COPY_PATIENCE_S = 60.0  # how long a node that takes a copy is looked for
AWAY_PATIENCE_S = 3600.0  # how long nodes that have a part and are away are waited for; then the part counts as lost
AWAY_SILENCE_S = 5.0  # so long without a word to anybody: nodes start at different times
_log = structlog.get_logger(__name__)


@dataclass
class Copies:
    """Belongs to the agent's loop. `directory` None: the store is shared, and nothing is copied.

    `address`: where other nodes reach this one's depot."""

    node_id: str
    token: str = field(repr=False)
    directory: Path | None
    address: str = ""
    _peers: dict[str, str] = field(default_factory=dict)
    _bringing: dict[str, Plan] = field(default_factory=dict)  # by process: the newest plan that waits for its part
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def meet(self, depots: Iterable[DepotAddress]) -> None:
        """These are the nodes that keep copies now."""
        self._peers = {entry.node_id: entry.address for entry in depots if entry.node_id != self.node_id}

    def forget(self, deleted_jobs: Iterable[str]) -> None:
        """Remove what is here of jobs that were deleted. Returns at once; safe to repeat."""
        if self.directory is not None:
            for job_id in deleted_jobs:
                if depot.is_job(job_id) and (self.directory / job_id).is_dir():
                    self._spawn(asyncio.to_thread(DirectoryStore(self.directory / job_id).remove))

    async def settled(self) -> None:
        """Return when nothing is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def settle(self, spec: ProcessSpec) -> bool:
        """Have a partition keep its snapshots here, unless its job has a store that is shared; whether it does so.

        Raises ValueError for a spec that is no JSON."""
        if self.directory is None or spec.kind != ProcessSpec.KIND_PARTITION:
            return False
        if json.loads(spec.spec_json).get("durability", {}).get("store") is not None:
            return False
        spec.store, spec.own_store = str(depot.job_directory(self.directory, spec.job_id)), True
        return True

    def copy(
        self, spec: ProcessSpec, plan: Plan | None, report: ProcessReport, say: Say, settled: Callable[[str], None]
    ) -> None:
        """A part is durable here: say so once it is on a second node, too. Returns at once.

        `settled` hears its path when it is, or when no node takes it: until then its partition writes no other."""
        self._spawn(self._copy(spec, plan, report, say, settled))

    def must_bring(self, spec: ProcessSpec, before: Plan | None, plan: Plan) -> bool:
        """Whether `plan`, after `before`, orders a restore from a part that may not be here yet."""
        if spec.process_id in self._bringing:
            return True
        orders = before is None or before.restore_generation != plan.restore_generation
        return orders and _own_part(spec, plan) is not None

    def bring(self, spec: ProcessSpec, plan: Plan, then: Callable[[Plan], None], say: Say) -> None:
        """Get the part that a plan restores, and call `then` with the newest plan. Returns at once."""
        is_busy = spec.process_id in self._bringing
        self._bringing[spec.process_id] = plan
        if not is_busy:
            self._spawn(self._bring(spec, then, say))

    def leave(self, process_id: str) -> None:
        """A process is gone: nothing need be brought for it. Safe to repeat."""
        self._bringing.pop(process_id, None)

    async def obtain(self, spec: ProcessSpec, newest: Callable[[], Plan | None], say: Say) -> SnapshotPart | None:
        """Return when the part that the newest plan restores, if any, is here or is lost; which one that is.

        Lost is what every node that had it says it has no more: then the job goes back to an older snapshot. Nodes that
        are away are waited for, and that is told."""
        directory, clock = Path(spec.store), asyncio.get_running_loop().time
        sought, began_s, failures, told = None, 0.0, 0, False
        while (part := _own_part(spec, newest())) is not None:
            if part != sought:
                sought, began_s, failures, told = part, clock(), 0, False
            away = await self._sought(spec.job_id, directory, part)
            waited_s = clock() - began_s
            if away is None:
                return part
            if not away or waited_s >= AWAY_PATIENCE_S:
                _log.warning("a part of a snapshot is lost", part=part.path, nodes=list(part.nodes), away=away)
                await self._admit_loss(directory)
                return part
            if not told and waited_s >= AWAY_SILENCE_S:
                told = True
                say(_waits(part, away))
            failures += 1
            await asyncio.sleep(delay_s(failures, random.random()))
        return None

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _copy(
        self, spec: ProcessSpec, plan: Plan | None, report: ProcessReport, say: Say, settled: Callable[[str], None]
    ) -> None:
        part = report.snapshot_part
        kept_steps = plan.kept_steps if plan is not None else ()
        request = TakePartRequest(job_id=spec.job_id, part=part, source=self.address, kept_steps=kept_steps)
        try:
            part.nodes.extend([self.node_id, await self._second(request)])
            say(report)
        except PsError as error:
            say(_unwritten(part, error))
        except Exception as problem:  # the end of a job waits for one word or the other
            _log.exception("copying a part of a snapshot failed", part=part.path)
            say(_unwritten(part, InternalError(f"copying {part.path} failed: {problem!r}")))
        finally:
            settled(part.path)

    async def _second(self, request: TakePartRequest) -> str:
        """The node that has taken the copy. Raises StorageError when none does in time."""
        loop = asyncio.get_running_loop()
        until, failures, why = loop.time() + COPY_PATIENCE_S, 0, "there is no other node with --own-store"
        while True:
            peers = dict(self._peers)  # who is met meanwhile is asked at the next try
            for node_id in _after(self.node_id, peers):
                try:
                    await depot.give(peers[node_id], self.token, request)
                    return node_id
                except PsError as error:
                    why = f"{node_id}: {error.cause}"
            failures += 1
            if loop.time() >= until:
                raise StorageError(
                    f"the snapshot of step {request.part.step} is on {self.node_id} alone, and does not count: {why}",
                    action="start a second psserver --own-store, or give the job a durability.store that all share",
                )
            await asyncio.sleep(delay_s(failures, random.random()))

    async def _bring(self, spec: ProcessSpec, then: Callable[[Plan], None], say: Say) -> None:
        process_id, looks = spec.process_id, True
        try:
            while looks:
                part = await self.obtain(spec, lambda: self._bringing.get(process_id), say)
                looks = part != _own_part(spec, self._bringing.get(process_id))
        finally:
            plan = self._bringing.pop(process_id, None)
        if plan is not None:
            then(plan)

    async def _sought(self, job_id: str, directory: Path, part: SnapshotPart) -> dict[str, str] | None:
        """None: the part is here. Otherwise the nodes that may have it, and why they do not give it."""
        away = {}
        try:
            if await asyncio.to_thread(depot.is_sound, directory, part):
                return None
        except StorageError as error:
            away[self.node_id] = error.cause
        for node_id in [node_id for node_id in part.nodes if node_id != self.node_id]:
            try:
                if node_id not in self._peers:
                    raise UnreachableError("it is away")
                await depot.get(self._peers[node_id], self.token, job_id, part, directory)
                return None
            except (NotFoundError, DamagedError, FrameError) as error:
                _log.warning("a node no longer has a part", node=node_id, part=part.path, cause=error.cause)
            except PsError as error:
                away[node_id] = error.cause
        return away

    async def _admit_loss(self, directory: Path) -> None:
        """Have the directory there: a part that is not in it is gone, not out of reach, and an older one will do."""
        try:
            await asyncio.to_thread(DirectoryStore(directory).create)
        except StorageError as error:
            _log.warning("the store of this node cannot be made", cause=error.cause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("copying a snapshot failed", exc_info=task.exception())


def _own_part(spec: ProcessSpec, plan: Plan | None) -> SnapshotPart | None:
    """What a plan has a partition restore, where nodes keep it for themselves; a standby restores nothing.

    A copy: plans are overwritten."""
    if plan is None or not plan.generation or plan.partitions[spec.rank].attempt not in (0, spec.attempt):
        return None
    for part in plan.restore.parts:
        if part.partition == spec.rank and part.nodes:
            own = SnapshotPart()
            own.CopyFrom(part)
            return own
    return None


def _unwritten(part: SnapshotPart, error: PsError) -> ProcessReport:
    error.details |= {"unwritten": str(part.step), "generation": str(part.generation)}
    return ProcessReport(warning=WarningMessage(error=detail_of(error), step=part.step))


def _waits(part: SnapshotPart, away: Mapping[str, str]) -> ProcessReport:
    nodes = "; ".join(f"{node_id}: {why}" for node_id, why in away.items())
    error = UnreachableError(
        f"the snapshot of step {part.step} waits for its part of partition-{part.partition}: {nodes}",
        action=f"start {' or '.join(away)} again; after an hour without, the job goes back to an older snapshot",
    )
    return ProcessReport(warning=WarningMessage(error=detail_of(error), step=part.step))


def _after(node_id: str, peers: Iterable[str]) -> list[str]:
    """The peers in a ring, beginning after `node_id`: copies are spread over the nodes."""
    ordered = sorted(peers)
    return [peer for peer in ordered if peer > node_id] + [peer for peer in ordered if peer < node_id]
