"""How a worker's agent and a server's differ, and their settings. Imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AgentRole:
    """`name` is "worker" or "server"; `module` is what its processes run; `runs` names them in the plural.

    `default_slots`: how many run at once; with `one_per_device`, one for each CUDA device if there are more.
    """

    name: str
    module: str
    runs: str
    default_slots: int
    one_per_device: bool = False
    keeps_snapshots: bool = False

    def slots(self, num_devices: int) -> int:
        """How many processes run at once on a node with this many CUDA devices, unless a setting says otherwise."""
        return max(self.default_slots, num_devices) if self.one_per_device else self.default_slots


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Settings of psworker and psserver. `slots: None` takes the role's default. `own_store`: a server's disk is not
    shared; it keeps snapshots of jobs without a durability.store there, and copies each to a second node."""

    node_id: str
    master: str
    state_dir: Path
    token_file: Path
    metrics_listen: str = "127.0.0.1:0"
    slots: int | None = None
    own_store: bool = False
    depot_listen: str = "127.0.0.1:0"
    log_level: str = "info"

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots must be at least 1, not {self.slots}")
        if not self.node_id or "/" in self.node_id:
            raise ValueError(f"node_id {self.node_id!r} is empty or contains a slash")
        if ":" not in self.master:
            raise ValueError(f"master {self.master!r} is neither host:port nor unix:/path")
