"""Draining a node: its processes move elsewhere first, and no step is lost or computed again. Pure.

The shards of a trainer on the node go to others; without others, another trainer is started first. A partition moves
while the whole job is paused: the plan asks to write the next step and to compute nothing beyond it; once that snapshot
is complete, all processes restore it. With a standby in sync elsewhere, the standby takes over instead, without a
pause. A standby is replaced on another node. What has no other place stays; `psctl drain` and `psctl nodes` say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psmaster.model import membership
from psmaster.model.job import Instant, Job
from psmaster.model.membership import Health, Node, NodeView, is_draining
from psmaster.model.plan import Placement, ProcessKind
from psmaster.model.state import State, node_views
from psmaster.scheduling.admission import choose_node, max_trainers
from psmaster.scheduling.draft import Draft, View

DRAINING = "draining"
DRAINED = "drained"
SAVE_S = 60.0  # how long a job waits for its snapshot; then it continues, and waits again after ...
RETRY_S = 120.0  # ... so long

Nodes = Mapping[str, NodeView]


def move_off_draining(draft: Draft, view: View) -> None:
    """Take a job's next step away from the nodes that drain. Nothing for a job that is about to end."""
    job = draft.job
    if job.stopping or job.finished is not None:
        return
    for kind in ProcessKind:
        leaving = [
            placement
            for placement in job.placements
            if placement.kind is kind and placement.placed and is_draining(view.nodes, placement.node_id)
        ]
        if job.plan is None:
            _start_elsewhere(draft, view, leaving)
        elif kind is ProcessKind.TRAINER:
            _move_trainers(draft, view, leaving)
        else:
            _move_partitions(draft, view, leaving)


def _start_elsewhere(draft: Draft, view: View, leaving: Sequence[Placement]) -> None:
    """Start what has not done anything yet on another node, if there is room."""
    for placement in leaving:
        if _have_room(draft.job, view.nodes, draft.excluded(view.nodes), [placement]):
            draft.vacate(placement)


def _move_trainers(draft: Draft, view: View, leaving: Sequence[Placement]) -> None:
    staying = _staying(draft.job, view.nodes)
    if any(placement.active for placement in staying):
        for placement in leaving:
            if _has_handed_over(draft.job, placement):
                _release(draft, placement)
    elif leaving and not staying and all(placement.placed for placement in draft.job.trainers):
        _start_another(draft, view, leaving)
    if not leaving:
        for placement in draft.job.trainers[max_trainers(draft.job.spec) :]:
            draft.remove_trainer(placement)  # it was to take over from one that stays after all


def _staying(job: Job, nodes: Nodes) -> list[Placement]:
    return [own for own in job.trainers if own.placed and not is_draining(nodes, own.node_id)]


def _has_handed_over(job: Job, placement: Placement) -> bool:
    """Whether a step was committed since it has no shards: no step waits for it."""
    has_rested = job.assignment is None or job.step > job.assignment.step
    return not placement.active or (not placement.shards and has_rested)


def _release(draft: Draft, placement: Placement) -> None:
    """Let a trainer end. Its placement is filled again on another node, or removed if it is one too many."""
    draft.emit("TrainerMoved", f"{placement.name} leaves {placement.node_id}, which drains; the others have its shards")
    if len(draft.job.trainers) > max_trainers(draft.job.spec):
        draft.remove_trainer(placement)
    else:
        draft.vacate(placement)


def _start_another(draft: Draft, view: View, leaving: Sequence[Placement]) -> None:
    """Start one more trainer elsewhere, since no other could take the shards over."""
    if node := choose_node(draft.job, view.nodes, ProcessKind.TRAINER, draft.excluded(view.nodes)):
        draft.add_trainer(node, f"to take over from {leaving[0].name} on {leaving[0].node_id}, which drains")


def _move_partitions(draft: Draft, view: View, held: Sequence[Placement]) -> None:
    leaving = [
        placement for placement in held if not placement.standby and not _handed_to_standby(draft, view, placement)
    ]
    for placement in draft.job.standbys:
        if placement.placed and is_draining(view.nodes, placement.node_id):
            draft.vacate(placement)
    job = draft.job
    whole = all(placement.active for placement in job.partitions)
    may_move = whole and leaving and _have_room(job, view.nodes, draft.excluded(view.nodes), leaving)
    if not may_move or _waits_in_vain(draft):
        if job.saving:
            draft.update(saving=False, held=-1)
        if not whole:
            _start_elsewhere(draft, view, [placement for placement in leaving if not placement.active])
    elif not job.saving:
        draft.update(saving=True, held=-1, held_s=None)
        nodes = ", ".join(dict.fromkeys(placement.node_id for placement in leaving))
        draft.emit("PartitionMoves", f"pauses after the next step, to move {_names(leaving)} away from {nodes}")
    elif job.held >= 0 and draft.snapshots.complete(job.held):
        draft.update(saving=False, held=-1, held_s=None)
        for placement in leaving:
            draft.vacate(placement)


def _handed_to_standby(draft: Draft, view: View, placement: Placement) -> bool:
    """Whether a standby in sync, on a node that stays, takes over from a partition that would have to move."""
    standby = draft.job.standby(placement.rank)
    if standby is None or not standby.synced or not placement.active or is_draining(view.nodes, standby.node_id):
        return False
    draft.emit("PartitionMoves", f"{placement.name} leaves {placement.node_id}, which drains; its standby takes over")
    draft.vacate(placement)
    draft.take_over(placement, placement.losses)
    return True


def _waits_in_vain(draft: Draft) -> bool:
    """Whether the snapshot at which the job pauses is late; for a while nothing is tried then."""
    job, now_s = draft.job, draft.now.mono_s
    if job.held >= 0 and job.held_s is None:
        draft.update(held_s=now_s)
    if draft.job.held_s is None:
        return False
    waited_s = now_s - draft.job.held_s
    if job.saving and job.held >= 0 and waited_s >= SAVE_S and not draft.snapshots.complete(job.held):
        draft.emit("PartitionStays", f"the snapshot of step {job.held} is late; training continues", warning=True)
        return True
    return not job.saving and waited_s < SAVE_S + RETRY_S


def _have_room(job: Job, nodes: Nodes, excluded: frozenset[str], placements: Sequence[Placement]) -> bool:
    """Whether all of these have another place."""
    planned: list[str] = []
    for placement in placements:
        node = choose_node(job, nodes, placement.kind, excluded, planned=planned)
        if node is None:
            return False
        planned.append(node.node_id)
    return True


# ---- for clients ----


def status(state: State, node: Node) -> str:
    """DRAINING while a job has a process on the node, DRAINED then; empty for a node that is not drained."""
    if node.node_id not in state.drains and not node.leaving:
        return ""
    held = any(placement.node_id == node.node_id for job in state.jobs.values() for placement in job.placements)
    return DRAINING if held else DRAINED


def problems(state: State, now: Instant, suspicion_s: float) -> list[str]:
    """What is wrong with the nodes, one line each. A drained node may be away, since it holds nothing."""
    found = {node: membership.health(node, now.mono_s, suspicion_s) for node in state.nodes.values()}
    return sorted(
        f"node {node.node_id} is {health}"
        for node, health in found.items()
        if health is not Health.READY and not (health is Health.DEAD and status(state, node) == DRAINED)
    )


def waits_for(state: State, node: Node, now: Instant, suspicion_s: float) -> list[str]:
    """What keeps a draining node from being drained, one line a job."""
    if status(state, node) != DRAINING:
        return []
    found = []
    for job in state.jobs.values():
        leaving = [placement for placement in job.placements if placement.node_id == node.node_id]
        if leaving:
            nodes = node_views(state.jobs, state.nodes, job.job_id, now, suspicion_s, state.drains)
            found.append(f"{job.job_id}: {_waits(job, nodes, leaving)}")
    return found


def _waits(job: Job, nodes: Nodes, leaving: Sequence[Placement]) -> str:
    if job.stopping or job.finished is not None:
        return "is about to end"
    if any(placement.kind is ProcessKind.PARTITION for placement in leaving):
        return _partitions_wait(job, nodes, leaving)
    staying = _staying(job, nodes)
    if any(placement.active for placement in staying) and job.plan is not None:
        return f"{_names(leaving)} hands over its shards"
    if staying:
        return f"waits until {_names(staying)} is ready on {', '.join(placement.node_id for placement in staying)}"
    return f"no other worker has room for {_names(leaving)}, without which it cannot continue"


def _partitions_wait(job: Job, nodes: Nodes, leaving: Sequence[Placement]) -> str:
    if job.held >= 0:
        return f"is paused at step {job.held} until its snapshot is complete"
    if job.saving:
        return "completes its step"
    away = [placement for placement in job.partitions if not placement.active]
    if away and job.plan is not None:
        return f"waits for {_names(away)}"
    excluded = frozenset(node_id for node_id, _, _ in job.excluded)
    if not _have_room(job, nodes, excluded, leaving):
        return f"no other server has room for {_names(leaving)}, without which it cannot continue"
    return f"{_names(leaving)} moves"


def _names(placements: Sequence[Placement]) -> str:
    return ", ".join(placement.name for placement in placements)
