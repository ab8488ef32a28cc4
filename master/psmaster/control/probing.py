"""Carries a probe out: orders to agents, round by round, and what came of each."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pscluster.errors import PsError, StateError, UnreachableError
from psmaster.control.loop import ControlLoop
from psmaster.model.job import ErrorInfo, Job
from psmaster.model.membership import Node
from psmaster.model.probe import ComputeProbe, OrderKind, PairProbe, ProbeAnswer, ProbeOrder, ProbeResult
from psmaster.scheduling.probe import NodePair, schedule

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ProbeTimeouts:
    """How long to wait for an agent's answer. Each is longer than an agent that knows the order takes, whose own limits
    end its measurement with a reason. `compute_s` is of one device."""

    listen_s: float = 5.0
    dial_s: float = 45.0
    compute_s: float = 75.0


async def probe(
    core: ControlLoop, beside_jobs: bool, timeouts: ProbeTimeouts | None = None
) -> AsyncGenerator[ProbeResult, None]:
    """The extent, then each result. Raises StateError while another probe runs, and while jobs do, unless
    `beside_jobs`. Closing it gives up; what agents are measuring ends by itself."""
    _require_idle(core.state.jobs, beside_jobs)
    orders = _Orders(core, timeouts or ProbeTimeouts())
    with core.probe_orders.one_probe():
        planned = schedule(core.state.nodes, core.now().mono_s, core.limits.suspicion_s)
        yield planned.extent
        for pairs in planned.pairs:
            async for measured in _each([orders.measure_pair(pair) for pair in pairs]):
                yield measured
        for workers in planned.workers:
            async for computed in _each([orders.measure_compute(worker) for worker in workers]):
                yield computed


def _require_idle(jobs: Mapping[str, Job], beside_jobs: bool) -> None:
    running = sorted(job.job_id for job in jobs.values() if job.state.live)
    if running and not beside_jobs:
        named = ", ".join(running[:3]) + (", ..." if len(running) > 3 else "")
        raise StateError(
            f"a probe slows down what runs: {named}",
            action="wait for the end, or allow it with --yes",
            details={"jobs": named},
        )


class _Orders:
    """The orders of one probe. A node that did not answer one is not asked again: its agent does not know them."""

    def __init__(self, core: ControlLoop, timeouts: ProbeTimeouts) -> None:
        self._core = core
        self._timeouts = timeouts
        self._silent: dict[str, ProbeAnswer] = {}

    async def measure_pair(self, pair: NodePair) -> PairProbe:
        dialer, listener, token = pair.dialer.node_id, pair.listener.node_id, secrets.token_hex(16)
        found = PairProbe(dialer=dialer, listener=listener, same_host=len(pair.hosts) == 1)
        if dialer in self._silent:
            return replace(found, error=self._silent[dialer].error)
        listen = ProbeOrder(kind=OrderKind.LISTEN, token=token, peer=dialer)
        ready = await self._give(listener, listen, self._timeouts.listen_s)
        if ready.error is not None:
            return replace(found, error=ready.error)
        dial = ProbeOrder(kind=OrderKind.DIAL, token=token, peer=listener, address=ready.address)
        measured = await self._give(dialer, dial, self._timeouts.dial_s)
        return replace(found, figures=measured.figures, error=measured.error)

    async def measure_compute(self, worker: Node) -> ComputeProbe:
        timeout_s = self._timeouts.compute_s * max(1, len(worker.devices))
        answer = await self._give(worker.node_id, ProbeOrder(kind=OrderKind.COMPUTE), timeout_s)
        return ComputeProbe(node_id=worker.node_id, devices=answer.devices, busy=answer.busy, error=answer.error)

    async def _give(self, node_id: str, order: ProbeOrder, timeout_s: float) -> ProbeAnswer:
        """Send an order to a node, under an id of its own, and wait for the answer. Where none comes, it has an error
        that names the node."""
        if node_id in self._silent:
            return self._silent[node_id]
        stream, order_id = self._core.stream_of(node_id), secrets.token_hex(8)
        if stream is None or stream.closed:
            return _failed(UnreachableError(f"{node_id} is not connected", action="see `psctl nodes`"))
        stream.probe(replace(order, order_id=order_id))
        answer = await self._core.probe_orders.answer_to(order_id, timeout_s)
        if answer is None:
            error = UnreachableError(
                f"{node_id} did not answer the order to measure within {timeout_s:g} s",
                action="an agent older than this master does not know it: see VERSION in `psctl nodes`",
                details={"reason": "timed out"},
            )
            answer = self._silent[node_id] = _failed(error)
        return answer


def _failed(error: PsError) -> ProbeAnswer:
    return ProbeAnswer(order_id="", error=ErrorInfo.of(error))


async def _each(works: Sequence[Coroutine[Any, Any, T]]) -> AsyncIterator[T]:
    """The results of all, run at once, as they come."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
