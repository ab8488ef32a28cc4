"""What makes an agent a server's: it runs partitions."""

from __future__ import annotations

from pscluster.agent.role import AgentRole

SERVER = AgentRole(name="server", module="psserver.partition", runs="partitions", default_slots=4, keeps_snapshots=True)
