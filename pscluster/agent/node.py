"""An agent put together: its directories, its processes, its stream to the master. Runs on the main thread's loop."""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

import structlog
from prometheus_client import REGISTRY

import pscluster
from pscluster.agent import metrics, resources
from pscluster.agent.bundles import BundleCache
from pscluster.agent.child import Patience
from pscluster.agent.copies import Copies
from pscluster.agent.depot import serving
from pscluster.agent.directories import AgentDirectories
from pscluster.agent.master_connection import MasterConnection
from pscluster.agent.process import Site
from pscluster.agent.resources import DeviceLedger
from pscluster.agent.role import AgentRole, AgentSettings
from pscluster.agent.supervisor import Supervisor
from pscluster.rpc import PROTOCOL, read_token
from pscluster.telemetry import MetricsEndpoint
from pscluster.v1.agents_pb2 import AgentMessage, Goodbye, Leaving, RegisterRequest, Role

FLUSH_S = 5.0
"""How long the end of an agent may wait for the master to take the last messages."""

ROLES = {"worker": Role.ROLE_WORKER, "server": Role.ROLE_SERVER}
_log = structlog.get_logger(__name__)


async def attend(role: AgentRole, settings: AgentSettings, environ: Mapping[str, str], patience: Patience) -> None:
    """Be an agent until SIGTERM or SIGINT, then end its processes and return.

    Raises PsError when it cannot start, or when a newer incarnation of the node has taken its place. `environ`
    is what its processes inherit.
    """
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    token = read_token(settings.token_file)
    directories = AgentDirectories.claim(settings.state_dir)
    try:
        endpoint = MetricsEndpoint(settings.metrics_listen)
        try:
            node = describe(role, settings, environ, endpoint.address)
            async with AsyncExitStack() as stack:
                if role.keeps_snapshots and settings.own_store:
                    depot = serving(directories.snapshots, settings.depot_listen, token)
                    node.depot_address = await stack.enter_async_context(depot)
                await _Agent(role, settings, token, node, directories, environ, patience).live(ending)
        finally:
            endpoint.close()
    finally:
        directories.release()


def describe(
    role: AgentRole, settings: AgentSettings, environ: Mapping[str, str], metrics_address: str
) -> RegisterRequest:
    """This node, as it registers; the incarnation is new with every call."""
    devices = resources.cuda_devices(environ)
    return RegisterRequest(
        node_id=settings.node_id,
        role=ROLES[role.name],
        incarnation=secrets.token_hex(8),
        resources=resources.measure(settings.slots or role.slots(len(devices)), devices),
        version=pscluster.__version__,
        protocol=PROTOCOL,
        hostname=socket.gethostname(),
        metrics_address=metrics_address,
    )


class _Agent:
    def __init__(
        self,
        role: AgentRole,
        settings: AgentSettings,
        token: str,
        node: RegisterRequest,
        directories: AgentDirectories,
        environ: Mapping[str, str],
        patience: Patience,
    ) -> None:
        self._attendant = MasterConnection(
            settings.master,
            token,
            node,
            states=lambda: self._supervisor.states(),
            assigned=lambda assignment: self._supervisor.apply(assignment),
            speeds=lambda: self._supervisor.speeds(),
        )
        self._metrics = metrics.ProcessMetrics()
        own_store = directories.snapshots if node.depot_address else None
        self._copies = Copies(node.node_id, token, own_store, node.depot_address)
        site = Site(
            command=(sys.executable, "-P", "-m", "pscluster.agent.launch", role.module),
            environ=environ,
            directories=directories,
            bundles=BundleCache(directories.bundles, self._fetch),
            devices=DeviceLedger(node.resources.devices),
            copies=self._copies,
            metrics=self._metrics,
            emit=self._attendant.emit,
            log_bytes=self._attendant.log_bytes,
        )
        self._supervisor = Supervisor(site, patience)
        self._patience = patience

    async def live(self, ending: asyncio.Event) -> None:
        """Attend and supervise until `ending`, or until something fails; then end every process."""
        REGISTRY.register(self._metrics)
        attending = asyncio.create_task(self._attendant.run())
        watching = asyncio.create_task(self._supervisor.watch())
        told = asyncio.create_task(ending.wait())
        try:
            done, _ = await asyncio.wait({attending, watching, told}, return_when=asyncio.FIRST_COMPLETED)
            _log.info("ends")
            if told in done:
                await self._hand_over()
            await self._supervisor.close()
            if told in done and self._attendant.connected:
                self._attendant.emit(AgentMessage(goodbye=Goodbye()))  # after all that its processes had to say
                await self._flush()
            for task in done:
                task.result()
        finally:
            await self._copies.close()
            for task in (attending, watching, told):
                task.cancel()
            await asyncio.gather(attending, watching, told, return_exceptions=True)
            REGISTRY.unregister(self._metrics)

    def _fetch(self, sha256: str) -> AsyncIterator[bytes]:
        return self._attendant.fetch(sha256)

    async def _hand_over(self) -> None:
        """Let the master move what runs here to other nodes, for as long as patience lasts and it is there to do so."""
        if self._supervisor.is_empty or not self._attendant.connected or not self._patience.leave_s:
            return
        self._attendant.emit(AgentMessage(leaving=Leaving()))
        waits = [asyncio.create_task(wait) for wait in (self._supervisor.emptied(), self._attendant.disconnected())]
        await asyncio.wait(waits, timeout=self._patience.leave_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def _flush(self) -> None:
        try:
            await asyncio.wait_for(self._attendant.flushed(), FLUSH_S)
        except TimeoutError:
            _log.warning("the master did not take the last messages in time")
