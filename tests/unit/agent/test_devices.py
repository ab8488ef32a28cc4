"""The agent's ledger of devices, and how many trainers a node runs at once."""

from __future__ import annotations

import asyncio

import pytest

from pscluster.agent.daemon import AgentRole
from pscluster.agent.resources import DeviceLedger
from pscluster.errors import DeviceError
from psserver.daemon import SERVER
from psworker.daemon import WORKER


def test_what_is_released_is_given_to_who_waits() -> None:
    async def body() -> None:
        ledger = DeviceLedger(["cuda:0"])
        assert await ledger.claim("a", "auto") == "cuda:0"
        assert await ledger.claim("b", "auto") == "cpu"
        with pytest.raises(DeviceError, match="cuda:0 is taken"):
            await ledger.claim("c", "cuda")
        ledger.leaving("a")
        ledger.leaving("a")
        ledger.leaving("stranger")
        waiting = [asyncio.create_task(ledger.claim(name, "auto")) for name in ("d", "e")]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        ledger.release("a")
        ledger.release("a")
        assert await asyncio.gather(*waiting) == ["cuda:0", "cpu"]

    asyncio.run(body())


def test_who_gives_up_waiting_holds_nothing() -> None:
    async def body() -> None:
        ledger = DeviceLedger(["cuda:0"])
        await ledger.claim("a", "cuda")
        ledger.leaving("a")
        waiting = asyncio.create_task(ledger.claim("b", "cuda"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        ledger.release("a")
        assert await ledger.claim("c", "cuda") == "cuda:0"

    asyncio.run(body())


@pytest.mark.parametrize(
    ("role", "num_devices", "slots"), [(WORKER, 0, 1), (WORKER, 1, 1), (WORKER, 8, 8), (SERVER, 0, 4), (SERVER, 8, 4)]
)
def test_a_worker_has_a_slot_for_each_device(role: AgentRole, num_devices: int, slots: int) -> None:
    assert role.slots(num_devices) == slots
