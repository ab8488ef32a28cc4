"""Assembles an agent: directories, processes, stream to the master. Runs on the main thread's loop."""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from prometheus_client import REGISTRY

import pscluster
from pscluster.agent import metrics, resources
from pscluster.agent.addresses import NodeAddress, PortRange, depot_choices
from pscluster.agent.child import GracePeriods
from pscluster.agent.cleanup import Cleanup
from pscluster.agent.context import AgentContext, NodeNetwork
from pscluster.agent.copies import Copies
from pscluster.agent.depot import serving
from pscluster.agent.directories import AgentDirectories, BundleCache
from pscluster.agent.isolation import Isolation
from pscluster.agent.isolation_trial import Trial, isolation_of, without_user_code
from pscluster.agent.master_connection import MasterConnection
from pscluster.agent.membership import Membership, Renewal, become_member
from pscluster.agent.probe.compute import DeviceMeter
from pscluster.agent.probe.pairs import ANY_PORT, ListenPlace
from pscluster.agent.probe.prober import Prober
from pscluster.agent.resources import DeviceLedger
from pscluster.agent.supervisor import Supervisor
from pscluster.errors import SettingsError
from pscluster.rpc import PROTOCOL
from pscluster.rpc.server import Revocations
from pscluster.security.identity import Role
from pscluster.telemetry import MetricsEndpoint
from pscluster.v1.agents_pb2 import AgentMessage, Goodbye, Leaving, RegisterRequest

if TYPE_CHECKING:
    from pscluster.agent.daemon import AgentRole, AgentSettings

LAUNCH = (sys.executable, "-P", "-m", "pscluster.agent.launch")
"""The command of every process, up to its module."""
FLUSH_S = 5.0
"""How long an agent that ends waits for the master to acknowledge the last messages."""

T = TypeVar("T")
_log = structlog.get_logger(__name__)


async def run_agent(role: AgentRole, settings: AgentSettings, environ: Mapping[str, str], grace: GracePeriods) -> None:
    """Run an agent until SIGTERM or SIGINT, then end its processes, which inherit `environ`, and return. Raises PsError
    when it cannot start, or when a newer incarnation of the node has registered."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        directories = AgentDirectories.claim(settings.state_dir)
        stack.callback(directories.release)
        endpoint = MetricsEndpoint(settings.metrics_listen)
        stack.callback(endpoint.close)
        member = await _unless(stop, become_member(Role(role.name), settings))
        if member is None:
            return
        network = network_of(settings, member)
        isolation = await _isolate(role, settings, directories, environ)
        node = registration(role, settings, member.node_id, environ, endpoint.address)
        node.isolation = isolation.mode if role.runs_user_code else ""
        if role.keeps_snapshots and settings.own_store:
            secured = member.access.source is not None
            choices = depot_choices(settings.depot_listen, secured, network.data_ports)
            depot = serving(directories.snapshots, choices, member.access, network.revocations)
            node.depot_address = await stack.enter_async_context(depot)
        await _Agent(role, settings, member, network, node, directories, isolation, environ, grace).run(stop)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; None when `stop` is set first."""
    stopping, working = asyncio.create_task(stop.wait()), asyncio.create_task(work)
    try:
        await asyncio.wait({stopping, working}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (stopping, working):
            task.cancel()
        await asyncio.gather(stopping, working, return_exceptions=True)


def network_of(settings: AgentSettings, member: Membership) -> NodeNetwork:
    """The settings of the network, checked. Raises SettingsError."""
    try:
        return NodeNetwork(
            address=NodeAddress(master=member.master, advertise=settings.advertise, interface=settings.interface),
            data_ports=PortRange.parse(settings.data_ports) if settings.data_ports is not None else None,
            revocations=Revocations(),
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


async def _isolate(
    role: AgentRole, settings: AgentSettings, directories: AgentDirectories, environ: Mapping[str, str]
) -> Isolation:
    """How user code is kept from this agent's key. Called once the key is there, before any process starts."""
    if not role.runs_user_code:
        return without_user_code(settings, directories)
    trial = Trial(launch=LAUNCH, modules=(role.module, "torch"), environ=environ, directories=directories)
    return await asyncio.to_thread(isolation_of, settings, trial)


def registration(
    role: AgentRole, settings: AgentSettings, node_id: str, environ: Mapping[str, str], metrics_address: str
) -> RegisterRequest:
    """The registration of this node, with a new incarnation."""
    devices = resources.cuda_devices(environ)
    return RegisterRequest(
        node_id=node_id,
        role=f"ROLE_{role.name.upper()}",
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
        member: Membership,
        network: NodeNetwork,
        node: RegisterRequest,
        directories: AgentDirectories,
        isolation: Isolation,
        environ: Mapping[str, str],
        grace: GracePeriods,
    ) -> None:
        self._master = MasterConnection(member.master, member.access, node, network.address)
        source = member.access.source
        self._renewal = Renewal(member, source) if source is not None else None
        self._metrics = metrics.ProcessMetrics()
        own_store = directories.snapshots if node.depot_address else None
        self._copies = Copies(node.node_id, member.access, own_store, node.depot_address)
        bundles = BundleCache(directories.bundles, self._master.download_bundle)
        self._cleanup = Cleanup(directories, bundles, settings.cache_bytes, self._master.find_unused)
        context = AgentContext(
            command=(*LAUNCH, role.module),
            environ=environ,
            directories=directories,
            bundles=bundles,
            devices=DeviceLedger(node.resources.devices),
            copies=self._copies,
            isolation=isolation,
            metrics=self._metrics,
            emit=self._master.emit,
            log_bytes=self._master.log_bytes,
            network=network,
        )
        self._supervisor = Supervisor(context, grace)
        compute = DeviceMeter(
            module=role.compute_probe, devices=node.resources.devices, threads=node.resources.cpu_cores, environ=environ
        )
        place = ListenPlace(ports=network.data_ports or ANY_PORT, source=source)
        self._prober = Prober(self._master.emit, place, compute)
        self._grace = grace

    async def run(self, stop: asyncio.Event) -> None:
        """Supervise until `stop`, or until something fails; then end every process."""
        REGISTRY.register(self._metrics)
        connection = asyncio.create_task(self._master.run(self._supervisor, self._prober))
        watching = asyncio.create_task(self._supervisor.watch())
        stopping = asyncio.create_task(stop.wait())
        cleaning = asyncio.create_task(self._cleanup.run(self._supervisor))
        vital = {connection, watching, stopping}
        if self._renewal is not None:
            vital.add(asyncio.create_task(self._renewal.run()))
        try:
            done, _ = await asyncio.wait(vital, return_when=asyncio.FIRST_COMPLETED)
            _log.info("agent ends")
            if stopping in done:
                await self._wait_drained()
            await self._supervisor.close()
            if stopping in done and self._master.connected:
                self._master.emit(AgentMessage(goodbye=Goodbye()))  # after all reports of its processes
                await self._flush()
            for task in done:
                task.result()
        finally:
            await self._copies.close()
            await self._prober.close()
            tasks = (*vital, cleaning)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            REGISTRY.unregister(self._metrics)

    async def _wait_drained(self) -> None:
        """Let the master move processes to other nodes, within the grace period and while it is connected."""
        if self._supervisor.is_empty or not self._master.connected or not self._grace.leave_s:
            return
        self._master.emit(AgentMessage(leaving=Leaving()))
        ends = (self._supervisor.wait_empty(), self._master.disconnected.wait())
        waits = [asyncio.ensure_future(end) for end in ends]
        await asyncio.wait(waits, timeout=self._grace.leave_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def _flush(self) -> None:
        try:
            await asyncio.wait_for(self._master.flushed.wait(), FLUSH_S)
        except TimeoutError:
            _log.warning("the master did not acknowledge the last messages in time")
