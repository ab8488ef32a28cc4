"""Standbys of a job with `durability.tier: replica`: where they run, and when one takes its partition's place. Pure.

A standby is a placement of its partition's rank, with attempts counted over both, so that the process that takes over
stays who it is. `synced` is the partition's word that it votes on nothing that this standby does not hold (see `bond`
in the partition). It lasts until either process is gone or the whole job goes back."""

from __future__ import annotations

from dataclasses import replace

from psmaster.model.job import Job
from psmaster.model.plan import Placement, ProcessKind
from psmaster.model.process import Loss
from psmaster.scheduling import retry
from psmaster.scheduling.admission import NodeView
from psmaster.scheduling.draft import Draft, View


def empty_placements(job: Job, num_partitions: int) -> tuple[Placement, ...]:
    """The placements that the job's standbys will fill; none where the spec asks for none."""
    if job.spec.durability.tier != "replica":
        return ()
    return tuple(Placement(kind=ProcessKind.PARTITION, rank=rank, standby=True) for rank in range(num_partitions))


def excluded_by_standby(draft: Draft, placement: Placement) -> frozenset[str] | None:
    """The nodes that a standby must not be on: its partition's; None: nowhere, its partition is nowhere yet."""
    partition = draft.job.placement(ProcessKind.PARTITION, placement.rank)
    return frozenset({partition.node_id}) if partition is not None and partition.placed else None


def lose(draft: Draft, view: View, placement: Placement, loss: Loss) -> None:
    """A standby is gone: the next plan goes on without it. A node where none gets in sync is left out in the end."""
    draft.say("StandbyLost", loss.message, warning=True)
    losses = placement.losses + loss.counted
    if losses > view.limits.max_losses:
        draft.exclude(
            placement.node_id,
            placement.incarnation,
            f"{placement.title} was lost {losses} times before it was in sync, the last time there",
        )
        losses = 0
    retry.unseat(draft, view, placement, loss, losses)


def succeed(draft: Draft, lost: Placement, losses: int) -> None:
    """The standby of a lost partition, if it has one, takes the placement: in sync, it goes on; else it is at least a
    process that is there, or on its way, and restores."""
    standby = draft.job.standby(lost.rank)
    if standby is None or not standby.placed:
        return
    draft.put(replace(standby, standby=False, losses=losses))
    draft.put(Placement(kind=ProcessKind.PARTITION, rank=lost.rank, standby=True, last_node_id=lost.node_id))
    if standby.synced:
        draft.say("TookOver", f"the standby on {standby.node_id} takes over as {lost.name}; no step is repeated")
    else:
        draft.say("Seated", f"{lost.name} goes to {standby.node_id}, whose standby was not in sync")


def preempt_standby(draft: Draft, view: View, excluded: frozenset[str]) -> NodeView | None:
    """Room for a partition that has none, made by ending a standby: steps need the one and not the other."""
    for placement in sorted(draft.job.standbys, key=lambda placement: (placement.synced, placement.rank)):
        node = view.nodes.get(placement.node_id)
        if placement.placed and node is not None and node.ready and node.node_id not in excluded:
            draft.say(
                "StandbyLost", f"{placement.title} on {placement.node_id} makes room for a partition", warning=True
            )
            draft.unseat(placement)
            return node
    return None


def shortfall(job: Job) -> str:
    """What keeps partitions from being replicated, in words; empty: nothing does, or nothing should be."""
    alone = [placement.rank for placement in job.standbys if not placement.placed]
    behind = [placement for placement in job.standbys if placement.placed and not placement.synced]
    told = []
    if alone:
        listed = ", ".join(f"partition-{rank}" for rank in alone)
        told.append(f"without standby for {listed}: no other server has room")
    if behind:
        told.append(
            "not in sync yet: " + ", ".join(f"{placement.title} on {placement.node_id}" for placement in behind)
        )
    return "; ".join(told)
