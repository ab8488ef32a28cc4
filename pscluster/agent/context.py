"""What all processes of an agent share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pscluster.agent import metrics
from pscluster.agent.addresses import NodeAddress, PortRange
from pscluster.agent.copies import Copies
from pscluster.agent.directories import AgentDirectories, BundleCache
from pscluster.agent.isolation import Isolation
from pscluster.agent.resources import DeviceLedger
from pscluster.rpc.server import Revocations
from pscluster.v1.agents_pb2 import AgentMessage


@dataclass(frozen=True, kw_only=True)
class NodeNetwork:
    """How other hosts reach this node, and whom it refuses. `data_ports` None: any port."""

    address: NodeAddress
    data_ports: PortRange | None = None
    revocations: Revocations = field(default_factory=Revocations)


@dataclass(frozen=True, kw_only=True)
class AgentContext:
    """What all processes of an agent share. `emit` queues a message for the master; `log_bytes` returns the bytes of
    output that the master has not acknowledged."""

    command: tuple[str, ...]
    environ: Mapping[str, str]
    directories: AgentDirectories
    bundles: BundleCache
    devices: DeviceLedger
    copies: Copies
    isolation: Isolation
    metrics: metrics.ProcessMetrics
    emit: Callable[[AgentMessage], None]
    log_bytes: Callable[[], int]
    network: NodeNetwork
