"""Orders to measure that agents have not answered yet. Belongs to the master's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pscluster.errors import StateError
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

    async def answer_to(self, order_id: str, timeout_s: float) -> ProbeAnswer | None:
        """Wait for the answer to an order that was just sent; None: there is none in time."""
        answered: asyncio.Future[ProbeAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[order_id] = answered
        try:
            async with asyncio.timeout(timeout_s):
                return await answered
        except TimeoutError:
            return None
        finally:
            del self._waiting[order_id]

    def answered(self, answer: ProbeAnswer) -> None:
        """An agent's answer. One that nobody waits for, or that came before, changes nothing."""
        waiting = self._waiting.get(answer.order_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
