"""Copies of snapshot parts on a server node whose disk is not shared: each is made before the part is reported to the
master, and fetched before a partition is ordered to restore it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from pscluster import errors
from pscluster.agent import depot
from pscluster.agent.status import detail_of
from pscluster.agent.tasks import spawn
from pscluster.rpc import Access
from pscluster.storage.directory import DirectoryStore
from pscluster.v1.agents_pb2 import DepotAddress
from pscluster.v1.depot_pb2 import TakePartRequest
from pscluster.v1.plan_pb2 import Plan, ProcessReport, ProcessSpec, SnapshotPart
from pscluster.v1.plan_pb2 import Warning as WarningMessage
from pscluster.wire.backoff import delay_s

Emit = Callable[[ProcessReport], None]
COPY_TIMEOUT_S = 60.0  # how long to look for a node that accepts a copy
AWAY_TIMEOUT_S = 3600.0  # how long to wait for unreachable nodes that have a part; then the part counts as lost
AWAY_REPORT_AFTER_S = 5.0  # how long before such a wait is reported: nodes start at different times
_log = structlog.get_logger(__name__)


@dataclass
class Copies:
    """Used from the agent's loop. `directory` None: the store is shared, and nothing is copied. `address`: of this
    node's depot, which may change with the node's."""

    node_id: str
    access: Access
    directory: Path | None
    address: str = ""
    _peers: dict[str, str] = field(default_factory=dict)
    _fetching: dict[str, Plan] = field(default_factory=dict)  # by process: the newest plan whose part is being fetched
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def update_peers(self, depots: Iterable[DepotAddress]) -> None:
        """Set the nodes that keep copies now."""
        self._peers = {entry.node_id: entry.address for entry in depots if entry.node_id != self.node_id}

    def forget(self, deleted_jobs: Iterable[str]) -> None:
        """Remove the parts of deleted jobs. Returns at once; safe to repeat."""
        if self.directory is not None:
            for job_id in deleted_jobs:
                if depot.is_job(job_id) and (self.directory / job_id).is_dir():
                    self._spawn(asyncio.to_thread(DirectoryStore(self.directory / job_id).remove))

    def use_own_store(self, spec: ProcessSpec) -> bool:
        """Make a partition keep its snapshots on this node unless its job has a shared store; returns whether it does.
        Raises ValueError for a spec that is not JSON."""
        if self.directory is None or spec.kind != ProcessSpec.KIND_PARTITION:
            return False
        if json.loads(spec.spec_json).get("durability", {}).get("store") is not None:
            return False
        spec.store, spec.own_store = str(depot.job_directory(self.directory, spec.job_id)), True
        return True

    def copy(
        self, spec: ProcessSpec, plan: Plan | None, report: ProcessReport, emit: Emit, on_settled: Callable[[str], None]
    ) -> None:
        """Report a part that is durable here once a second node has it, too. Returns at once.

        `on_settled` is called with its path then, or when no node accepts it; before, its partition writes no other."""
        self._spawn(self._copy(spec, plan, report, emit, on_settled))

    def must_fetch(self, spec: ProcessSpec, before: Plan | None, plan: Plan) -> bool:
        """Whether `plan`, after `before`, orders a restore from a part that may be missing here."""
        if spec.process_id in self._fetching:
            return True
        orders = before is None or before.restore_generation != plan.restore_generation
        return orders and _part_to_restore(spec, plan) is not None

    def fetch(self, spec: ProcessSpec, plan: Plan, then: Callable[[Plan], None], emit: Emit) -> None:
        """Fetch the part that a plan restores, then call `then` with the newest plan. Returns at once."""
        is_running = spec.process_id in self._fetching
        self._fetching[spec.process_id] = plan
        if not is_running:
            self._spawn(self._fetch(spec, then, emit))

    def cancel_fetch(self, process_id: str) -> None:
        """Stop fetching for a process that has exited. Safe to repeat."""
        self._fetching.pop(process_id, None)

    async def wait_for_part(
        self, spec: ProcessSpec, newest: Callable[[], Plan | None], emit: Emit
    ) -> SnapshotPart | None:
        """Wait until the part that the newest plan restores, if any, is here or is lost; returns that part.

        A part is lost when every node that had it reports that it no longer has it; the job then goes back to an older
        snapshot. Unreachable nodes are waited for, and the wait is reported."""
        directory, clock = Path(spec.store), asyncio.get_running_loop().time
        wanted, began_s, failures, reported = None, 0.0, 0, False
        while (part := _part_to_restore(spec, newest())) is not None:
            if part != wanted:
                wanted, began_s, failures, reported = part, clock(), 0, False
            away = await self._try_fetch(spec.job_id, directory, part)
            waited_s = clock() - began_s
            if away is None:
                return part
            if not away or waited_s >= AWAY_TIMEOUT_S:
                _log.warning("a snapshot part is lost", part=part.path, nodes=list(part.nodes), away=away)
                await self._create_store(directory)
                return part
            if not reported and waited_s >= AWAY_REPORT_AFTER_S:
                reported = True
                emit(_waiting(part, away))
            failures += 1
            await asyncio.sleep(delay_s(failures, random.random()))
        return None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _copy(
        self, spec: ProcessSpec, plan: Plan | None, report: ProcessReport, emit: Emit, on_settled: Callable[[str], None]
    ) -> None:
        part = report.snapshot_part
        kept_steps = plan.kept_steps if plan is not None else ()
        request = TakePartRequest(job_id=spec.job_id, part=part, source=self.address, kept_steps=kept_steps)
        try:
            part.nodes.extend([self.node_id, await self._copy_to_peer(request)])
            emit(report)
        except errors.PsError as error:
            emit(_copy_failed(part, error))
        except Exception as problem:  # a job that ends waits for one report or the other
            _log.exception("copying a snapshot part failed", part=part.path)
            emit(_copy_failed(part, errors.InternalError(f"copying {part.path} failed: {problem!r}")))
        finally:
            on_settled(part.path)

    async def _copy_to_peer(self, request: TakePartRequest) -> str:
        """The node that accepted the copy. Raises StorageError when none does in time."""
        loop = asyncio.get_running_loop()
        until, failures, why = loop.time() + COPY_TIMEOUT_S, 0, "there is no other node with --own-store"
        while True:
            peers = dict(self._peers)  # nodes added meanwhile are tried next time
            for node_id in _ring_order(self.node_id, peers):
                try:
                    await depot.give(peers[node_id], self.access, request)
                    return node_id
                except errors.PsError as error:
                    why = f"{node_id}: {error.cause}"
            failures += 1
            if loop.time() >= until:
                raise errors.StorageError(
                    f"snapshot {request.part.step} is incomplete, a part is only on {self.node_id}: {why}",
                    action="start a second psserver --own-store, or give the job a shared durability.store",
                )
            await asyncio.sleep(delay_s(failures, random.random()))

    async def _fetch(self, spec: ProcessSpec, then: Callable[[Plan], None], emit: Emit) -> None:
        process_id, changed = spec.process_id, True
        try:
            while changed:
                part = await self.wait_for_part(spec, lambda: self._fetching.get(process_id), emit)
                changed = part != _part_to_restore(spec, self._fetching.get(process_id))
        finally:
            plan = self._fetching.pop(process_id, None)
        if plan is not None:
            then(plan)

    async def _try_fetch(self, job_id: str, directory: Path, part: SnapshotPart) -> dict[str, str] | None:
        """Fetch the part if it is missing. None: it is here. Otherwise the unreachable nodes, each with the reason."""
        away = {}
        try:
            if await asyncio.to_thread(depot.is_sound, directory, part):
                return None
        except errors.StorageError as error:
            away[self.node_id] = error.cause
        for node_id in [node_id for node_id in part.nodes if node_id != self.node_id]:
            try:
                if node_id not in self._peers:
                    raise errors.UnreachableError("it is not connected")
                await depot.get(self._peers[node_id], self.access, job_id, part, directory)
                return None
            except (errors.NotFoundError, errors.DamagedError, errors.FrameError) as error:
                _log.warning("a node no longer has a part", node=node_id, part=part.path, cause=error.cause)
            except errors.PsError as error:
                away[node_id] = error.cause
        return away

    async def _create_store(self, directory: Path) -> None:
        """Create the directory: a part that is missing in an existing store is lost; a missing store may come back."""
        try:
            await asyncio.to_thread(DirectoryStore(directory).create)
        except errors.StorageError as error:
            _log.warning("the store of this node cannot be created", cause=error.cause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        spawn(self._tasks, work, "copying a snapshot failed")


def _part_to_restore(spec: ProcessSpec, plan: Plan | None) -> SnapshotPart | None:
    """A copy of the part that a plan orders a partition to restore from nodes' own stores; a standby restores none."""
    if plan is None or not plan.generation or plan.partitions[spec.rank].attempt not in (0, spec.attempt):
        return None
    for part in plan.restore.parts:
        if part.partition == spec.rank and part.nodes:
            own = SnapshotPart()
            own.CopyFrom(part)
            return own
    return None


def _copy_failed(part: SnapshotPart, error: errors.PsError) -> ProcessReport:
    error.details |= {"unwritten": str(part.step), "generation": str(part.generation)}
    return ProcessReport(warning=WarningMessage(error=detail_of(error), step=part.step))


def _waiting(part: SnapshotPart, away: Mapping[str, str]) -> ProcessReport:
    nodes = "; ".join(f"{node_id}: {why}" for node_id, why in away.items())
    error = errors.UnreachableError(
        f"restoring step {part.step} waits for the part of partition-{part.partition}: {nodes}",
        action=f"start {' or '.join(away)} again; after an hour the job goes back to an older snapshot",
    )
    return ProcessReport(warning=WarningMessage(error=detail_of(error), step=part.step))


def _ring_order(node_id: str, peers: Iterable[str]) -> list[str]:
    """The peers as a ring that begins after `node_id`: this spreads copies over the nodes."""
    ordered = sorted(peers)
    return [peer for peer in ordered if peer > node_id] + [peer for peer in ordered if peer < node_id]
