"""What makes an agent a worker's: it runs trainers."""

from __future__ import annotations

from pscluster.agent.role import AgentRole

WORKER = AgentRole(name="worker", module="psworker.trainer", runs="trainers", default_slots=1, one_per_device=True)
