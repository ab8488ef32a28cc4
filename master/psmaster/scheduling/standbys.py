"""Standbys of a job with `durability.tier: replica`: where they run, and when one takes its partition's place. Pure.

A standby is a placement of its partition's rank, with attempts counted over both, so that the process that takes over
stays who it is. `synced`: the partition reported that it votes on nothing that this standby does not hold (see
`InSyncState` in the partition). It holds until either process is lost or the job is restored."""

from __future__ import annotations

from dataclasses import replace

from psmaster.model.job import Job
from psmaster.model.membership import NodeView
from psmaster.model.plan import Placement, ProcessKind
from psmaster.scheduling.draft import Draft, View


def empty_placements(job: Job, num_partitions: int) -> tuple[Placement, ...]:
    """One empty placement for each standby; none unless the spec asks for standbys."""
    if job.spec.durability.tier != "replica":
        return ()
    return tuple(Placement(kind=ProcessKind.PARTITION, rank=rank, standby=True) for rank in range(num_partitions))


def excluded_by_standby(draft: Draft, placement: Placement) -> frozenset[str] | None:
    """The nodes where a standby must not run: its partition's; None while its partition has no node."""
    partition = draft.job.placement(ProcessKind.PARTITION, placement.rank)
    return frozenset({partition.node_id}) if partition is not None and partition.placed else None


def take_over(draft: Draft, lost: Placement, losses: int) -> None:
    """Give a lost partition's placement to its standby, if it has one. In sync, the standby continues; otherwise it
    restores, which still saves the start of a process."""
    standby = draft.job.standby(lost.rank)
    if standby is None or not standby.placed:
        return
    draft.set_placement(replace(standby, standby=False, losses=losses))
    draft.set_placement(Placement(kind=ProcessKind.PARTITION, rank=lost.rank, standby=True, last_node_id=lost.node_id))
    if standby.synced:
        draft.emit("TookOver", f"the standby on {standby.node_id} takes over as {lost.name}; no step is repeated")
    else:
        draft.emit("Placed", f"{lost.name} goes to {standby.node_id}, whose standby was not in sync")


def preempt_standby(draft: Draft, view: View, excluded: frozenset[str]) -> NodeView | None:
    """Make room for a partition by ending a standby: steps need the partition only."""
    for placement in sorted(draft.job.standbys, key=lambda placement: (placement.synced, placement.rank)):
        node = view.nodes.get(placement.node_id)
        if placement.placed and node is not None and node.ready and node.node_id not in excluded:
            message = f"{placement.title} on {placement.node_id} makes room for a partition"
            draft.emit("StandbyLost", message, warning=True)
            draft.vacate(placement)
            return node
    return None


def shortfall(job: Job) -> str:
    """Why partitions are not replicated, in words; empty when all are, or none should be."""
    alone = [placement.rank for placement in job.standbys if not placement.placed]
    behind = [placement for placement in job.standbys if placement.placed and not placement.synced]
    reasons = []
    if alone:
        listed = ", ".join(f"partition-{rank}" for rank in alone)
        reasons.append(f"without standby for {listed}: no other server has room")
    if behind:
        listed = ", ".join(f"{placement.title} on {placement.node_id}" for placement in behind)
        reasons.append(f"not in sync yet: {listed}")
    return "; ".join(reasons)
