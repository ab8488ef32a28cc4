"""Orders to measure that agents have not answered yet. Belongs to the master's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pscluster.errors import StateError, UnreachableError
from psmaster.model.job import ErrorInfo
from psmaster.model.probe import ProbeAnswer


class ProbeOrders:
    """Bounded by the one probe that runs at a time."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[ProbeAnswer]] = {}
        self._probing = False

    @contextmanager
    def one_probe(self) -> Iterator[None]:
        """Raises StateError while another probe is in this context: their measurements would disturb each other."""
        if self._probing:
            raise StateError("another probe runs", action="repeat this when it is done")
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    async def answer_to(self, order_id: str, node_id: str, timeout_s: float) -> ProbeAnswer:
        """Wait for a node's answer to an order that was just sent. Where none comes, it has an error that names the
        node."""
        answered: asyncio.Future[ProbeAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[order_id] = answered
        try:
            async with asyncio.timeout(timeout_s):
                return await answered
        except TimeoutError:
            error = UnreachableError(
                f"{node_id} did not answer the order to measure within {timeout_s:g} s",
                action="an agent older than this master does not know it: see VERSION in `psctl nodes`",
                details={"reason": "timed out"},
            )
            return ProbeAnswer(order_id=order_id, error=ErrorInfo.of(error))
        finally:
            del self._waiting[order_id]

    def answered(self, answer: ProbeAnswer) -> None:
        """An agent's answer. One that nobody waits for, or that came before, changes nothing."""
        waiting = self._waiting.get(answer.order_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
