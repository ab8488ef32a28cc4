"""Who computes where on this node: no two trainers ever share a CUDA device."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pscluster.devices import choose_device


class DeviceLedger:
    """Which process holds which device. Belongs to the agent's loop."""

    def __init__(self, present: Sequence[str]) -> None:
        """`present`: the node's CUDA devices, in the order in which they are given out."""
        self._present = tuple(present)
        self._held: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._released = asyncio.Event()

    async def claim(self, process_id: str, wanted: str) -> str:
        """A device for a process, which holds it until `release`. Raises DeviceError.

        Blocks while all that fit are held and one of the holders is being ended: a job that takes another's place is
        started before the other's last process is gone.
        """
        while (device := self._choose(wanted)) is None:
            await self._released.wait()
        self._held[process_id] = device
        return device

    def leaving(self, process_id: str) -> None:
        """The process is being ended: what it holds will soon be free. Safe to repeat."""
        if process_id in self._held:
            self._leaving.add(process_id)

    def release(self, process_id: str) -> None:
        """The process is gone. Safe to repeat."""
        self._held.pop(process_id, None)
        self._leaving.discard(process_id)
        self._released.set()
        self._released = asyncio.Event()  # who waits from now on waits for the next one

    def _choose(self, wanted: str) -> str | None:
        leaving = {self._held[process_id] for process_id in self._leaving}
        held = set(self._held.values()) - leaving
        return choose_device(wanted, self._present, held, leaving)
