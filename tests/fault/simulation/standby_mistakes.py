"""Mistakes to plant where standbys take over and where nodes are drained; in the catalogue of `mistakes`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from psmaster.model.job import Job
from psmaster.model.membership import NodeView
from psmaster.scheduling import recovery
from psserver.partition.actions import Action
from psserver.partition.replication import in_sync
from psserver.partition.replication.in_sync import InSyncState
from psserver.partition.replication.standby import Standby
from tests.fault.simulation.mistakes import Patch, mistake_in

_KILLED = {"kill_partition": 3.0, "kill_server": 1.0}


@mistake_in(tier="replica", partitions=1, servers=2, compute_s=0.1, every_s=0.5, storm_s=8.0, faults=_KILLED)
def votes_do_not_wait_for_the_standby() -> Iterable[Patch]:
    yield patch.object(in_sync, "may_vote", lambda _in_sync_state, _step: True)


@mistake_in(tier="replica", partitions=2, servers=3, compute_s=0.1, every_s=0.3, storm_s=8.0, faults=_KILLED)
def a_standby_is_relied_on_before_it_is_in_sync() -> Iterable[Patch]:
    def acknowledge(held: InSyncState, acked_version: int, _promised: int) -> tuple[InSyncState, bool]:
        return replace(
            held, acked_version=max(held.acked_version, acked_version), reported_in_sync=True
        ), not held.reported_in_sync

    yield patch.object(in_sync, "acknowledge", acknowledge)


@mistake_in(tier="replica", partitions=2, servers=3)
def a_standby_begins_without_the_update_counts() -> Iterable[Patch]:
    begin = Standby._begin

    def begin_young(self: Standby, header: Any, sync: Any) -> list[Action]:
        return begin(self, header, replace(sync, update_counts=[0 for _ in sync.update_counts]))

    yield patch.object(Standby, "_begin", begin_young)


@mistake_in(
    workers=1, servers=1, partitions=1, tier="snapshot", storm_s=8.0, faults={"drain": 1.0, "kill_partition": 1.0}
)
def draining_nodes_are_given_processes() -> Iterable[Patch]:
    choose = recovery.choose_node

    def choose_any(job: Job, nodes: Mapping[str, NodeView], *others: Any) -> NodeView | None:
        return choose(job, {node_id: replace(node, ready=node.alive) for node_id, node in nodes.items()}, *others)

    yield patch.object(recovery, "choose_node", choose_any)
