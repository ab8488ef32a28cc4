"""An agent's supervisor without a master, with processes that play what the test says."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from pscluster.agent import metrics
from pscluster.agent.addresses import NodeAddress
from pscluster.agent.child import GracePeriods
from pscluster.agent.confine import Mode
from pscluster.agent.context import AgentContext, NodeNetwork
from pscluster.agent.copies import Copies
from pscluster.agent.directories import AgentDirectories, BundleCache
from pscluster.agent.isolation import Isolation
from pscluster.agent.resources import DeviceLedger
from pscluster.agent.supervisor import Supervisor
from pscluster.rpc import Access
from pscluster.v1.agents_pb2 import AgentMessage


class Received:
    """Messages that were emitted, and a way to wait for one."""

    def __init__(self) -> None:
        self.messages: list[AgentMessage] = []
        self._arrived = asyncio.Event()

    def emit(self, message: AgentMessage) -> None:
        self.messages.append(message)
        self._arrived.set()

    async def until(self, seen: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not seen():
                self._arrived.clear()
                await self._arrived.wait()

    def bodies(self) -> list[str]:
        return [
            message.event.report.WhichOneof("body") if message.HasField("event") else message.WhichOneof("body")
            for message in self.messages
        ]


LOCAL = NodeNetwork(address=NodeAddress(master="unix:/m", advertise="127.0.0.1"))


def supervise(
    bench: Any,
    body: Callable[[Supervisor, Received], Awaitable[None]],
    devices: Sequence[str] = (),
    network: NodeNetwork = LOCAL,
) -> None:
    """Run `body` with the supervisor of a node that has these CUDA devices, and is reached so."""

    async def nothing(_sha256: str) -> AsyncIterator[bytes]:
        raise RuntimeError("no bundle is asked for here")
        yield b""

    async def everything() -> None:
        received = Received()
        directories = AgentDirectories.claim(bench.state_dir)
        context = AgentContext(
            command=(sys.executable, "-P", "-m", "pscluster.agent.launch", "played_process"),
            environ=bench.environ(),
            directories=directories,
            bundles=BundleCache(directories.bundles, nothing),
            devices=DeviceLedger(devices),
            copies=Copies("server-0", Access(), None),
            isolation=Isolation(mode=Mode.NONE, hidden=(), account=None, home=""),
            metrics=metrics.ProcessMetrics(),
            emit=received.emit,
            log_bytes=lambda: 0,
            network=network,
        )
        supervisor = Supervisor(context, GracePeriods(terminate_s=0.2, kill_s=0.4))
        try:
            await body(supervisor, received)
        finally:
            await supervisor.close()
            directories.release()

    asyncio.run(everything())
