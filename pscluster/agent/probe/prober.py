"""Answers the master's orders to measure. Used from the agent's loop; what blocks runs in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, replace

import structlog

from pscluster.agent.addresses import LOOPBACK
from pscluster.agent.probe import pairs
from pscluster.agent.probe.compute import DeviceMeter
from pscluster.agent.probe.pairs import ListenPlace, OpenSockets, PairListener
from pscluster.agent.probe.session import ProbeLimits
from pscluster.agent.status import detail_of
from pscluster.agent.tasks import spawn
from pscluster.errors import FrameError, PsError, StateError
from pscluster.v1.agents_pb2 import AgentMessage
from pscluster.v1.probe_pb2 import PairFigures, ProbeAnswer, ProbeOrder

MAX_ORDERS = 4
"""At once; the master gives a node one after the other."""
_log = structlog.get_logger(__name__)


class Prober:
    """Every order is answered once, by `emit`, unless the agent ends before."""

    def __init__(
        self,
        emit: Callable[[AgentMessage], None],
        place: ListenPlace,
        compute: DeviceMeter,
        limits: ProbeLimits | None = None,
    ) -> None:
        self._emit = emit
        self._place = place
        self._compute = compute
        self._limits = limits or ProbeLimits()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets = OpenSockets()

    def handle(self, order: ProbeOrder, advertised_host: str, *, busy: bool) -> None:
        """Carry out an order; returns at once. `advertised_host`: where others reach this node now; empty: loopback.
        `busy`: processes of jobs run on this node and use its devices."""
        place = replace(self._place, host=advertised_host.strip("[]") or LOOPBACK)
        spawn(self._tasks, self._carry_out(order, place, busy, len(self._tasks)), "a probe failed")

    async def close(self) -> None:
        """Give up what is being measured."""
        self._sockets.shut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_out(self, order: ProbeOrder, place: ListenPlace, busy: bool, others: int) -> None:
        answer = ProbeAnswer(order_id=order.order_id)
        try:
            if others >= MAX_ORDERS:
                raise StateError("too many probes at once on this node")
            match order.kind:
                case ProbeOrder.KIND_LISTEN:
                    await self._listen(order, place)
                    return
                case ProbeOrder.KIND_DIAL:
                    answer.figures.CopyFrom(await self._dial(order))
                case ProbeOrder.KIND_COMPUTE if busy:
                    answer.busy = True
                case ProbeOrder.KIND_COMPUTE:
                    answer.devices.extend(await self._compute.measure())
                case _:
                    raise FrameError(f"this agent does not know probe {order.kind}", details={"field": "kind"})
        except PsError as error:
            answer.error.CopyFrom(detail_of(error))
        self._emit(AgentMessage(probe=answer))

    async def _listen(self, order: ProbeOrder, place: ListenPlace) -> None:
        """Answer with the address, then serve the peer, whose answer says how that went. Raises AddressInUseError."""
        listener = PairListener(place, self._sockets)
        try:
            self._emit(AgentMessage(probe=ProbeAnswer(order_id=order.order_id, address=listener.address)))
            await asyncio.to_thread(listener.serve, order.token, order.peer, self._limits)
        except (OSError, FrameError) as error:
            _log.warning("the peer of a probe did not come, or broke off", peer=order.peer, cause=str(error))

    async def _dial(self, order: ProbeOrder) -> PairFigures:
        measured = await asyncio.to_thread(
            pairs.dial, order.address, order.token, order.peer, self._limits, self._place.source, self._sockets
        )
        return PairFigures(**asdict(measured))
