"""The stages of reconciliation for processes that are lost, replaced and become ready again. Pure.

A process that had been ready is replaced at once, preferably on the same node. Where one was lost before it became
ready, something may be missing on its node, such as disk space: its replacement goes to another node if one has room,
and starts after a delay that doubles with each loss, so that a fault of some seconds does not use up all the losses
that a placement may have. The placement keeps its slot meanwhile."""

from __future__ import annotations

from dataclasses import replace

from psmaster.model import snapshot_catalog
from psmaster.model.job import ErrorInfo, Job, Recovery
from psmaster.model.membership import NodeView
from psmaster.model.plan import Placement, ProcessKind
from psmaster.model.process import PartitionFacts, TrainerFacts, failure_of, ready_facts, was_ready
from psmaster.scheduling import crashes, numerics, process_losses
from psmaster.scheduling.admission import choose_node, max_trainers
from psmaster.scheduling.draft import Draft, View
from psmaster.scheduling.process_losses import NetworkCut, ProcessLoss, loss_of, out_of_reach

_SUSPICIONS = {"silent": "sends no heartbeats", "stalled": "is stalled at one microbatch"}


def vacate_lost(draft: Draft, view: View) -> None:
    """Vacate the placements whose process is lost. FAILED when one loses too many without a new step in between."""
    cut = process_losses.find_cut(draft.job, view.processes, view.now)
    for placement in (*draft.job.standbys, *draft.job.working):
        loss = loss_of(placement, draft.job, view) or _out_of_reach(draft, view, placement, cut)
        if loss is None or (draft.job.finished is not None and placement.kind is ProcessKind.TRAINER):
            continue
        if not placement.standby and failure_of(placement, draft.job, view.processes) is not None:
            continue  # `completion.fail_on_reports` ends the job
        if not draft.is_dispensable(placement) and crashes.fail_if_repeated(draft, view, placement):
            return
        draft.emit(f"{_event_name(placement)}Lost", loss.message, warning=True)
        count = placement.losses + loss.counted
        if count > view.limits.max_losses and (placement.standby or draft.is_dispensable(placement)):
            before = "in sync" if placement.standby else "ready"
            why = f"{placement.title} was lost {count} times before it was {before}, the last time there"
            draft.exclude(placement.node_id, placement.incarnation, why)
            count = 0
        if placement.standby:
            _vacate(draft, view, placement, loss, count)
            continue
        _void_snapshot(draft, loss.error)
        if count > view.limits.max_losses:
            cause = f"{loss.error.cause}; {placement.name} was lost {count} times without a new step in between"
            draft.fail(replace(loss.error, cause=cause))
            return
        _replace(draft, view, placement, loss, count)


def settle_mismatch(draft: Draft, _view: View) -> None:
    """After a mismatch of an audit: leave the node that was named out, and have the job go back, because no audit
    vouches for all that its trainers gave; FAILED when no node was named."""
    mismatch = draft.job.mismatch
    if mismatch is None:
        return
    if not mismatch.node_id:
        draft.fail(mismatch.error)
        return
    draft.update(mismatch=None, going_back=True)
    _begin_recovery(draft, ProcessKind.TRAINER)
    for placement in draft.job.trainers:
        if placement.node_id == mismatch.node_id:
            draft.exclude(placement.node_id, placement.incarnation, mismatch.error.cause)
            draft.vacate(placement)


def _replace(draft: Draft, view: View, placement: Placement, loss: ProcessLoss, count: int) -> None:
    """Vacate the placement of a trainer or partition after its `count`th loss. What can take it over at once does."""
    if draft.job.plan is not None and placement.active:
        _begin_recovery(draft, placement.kind)
    _vacate(draft, view, placement, loss, count)
    if placement.kind is ProcessKind.PARTITION:
        draft.take_over(placement, count)
    if loss.elsewhere:
        _place_elsewhere(draft, view, placement)


def _event_name(placement: Placement) -> str:
    return "Standby" if placement.standby else placement.kind.value.capitalize()


def _vacate(draft: Draft, view: View, placement: Placement, loss: ProcessLoss, count: int) -> None:
    """Vacate a placement after its `count`th loss (0: the count begins anew), and note where and when to retry."""
    if loss.counted and count and not was_ready(placement, draft.job, view.processes):
        others = tuple(node_id for node_id in placement.failed_on if node_id != placement.node_id)
        until_s = draft.now.mono_s + process_losses.retry_delay_s(count)
        placement = replace(placement, failed_on=(*others, placement.node_id), not_before_s=until_s)
    draft.vacate(placement, losses=count)


def end_retry_waits(draft: Draft, _view: View) -> None:
    """Let the processes start whose retry delay is over. A wait longer than the maximum was begun on another clock,
    before the master's machine restarted."""
    for placement in draft.job.placements:
        if placement.held_back and not 0.0 < placement.not_before_s - draft.now.mono_s <= process_losses.MAX_RETRY_S:
            draft.set_placement(replace(placement, not_before_s=0.0))


def _out_of_reach(draft: Draft, view: View, placement: Placement, cut: NetworkCut) -> ProcessLoss | None:
    """The loss of a partition that others cannot reach and that can run elsewhere."""
    if placement.kind is not ProcessKind.PARTITION or placement.standby or placement.rank not in cut.partitions:
        return None
    standby = draft.job.standby(placement.rank)
    if _elsewhere(draft, view, placement) is None and (standby is None or not standby.synced):
        return None
    return out_of_reach(placement, process_losses.describe_reports(cut.reports))


def _elsewhere(draft: Draft, view: View, placement: Placement) -> NodeView | None:
    return _choose(draft, view, placement, draft.excluded(view.nodes) | {placement.node_id})


def _place_elsewhere(draft: Draft, view: View, lost: Placement) -> None:
    """Assign another node to a placement whose process was out of reach, unless a standby took it over. The old node
    is not excluded for good: networks recover, and a lasting cut is found again."""
    placement = draft.job.placement(lost.kind, lost.rank)
    node = _elsewhere(draft, view, lost)
    if placement is not None and not placement.placed and node is not None:
        draft.assign_node(placement, node)


def _void_snapshot(draft: Draft, error: ErrorInfo) -> None:
    """Drop the snapshot that a partition reported as unreadable; the job then restores an older one."""
    step = error.detail("void_snapshot")
    if step.isdecimal() and draft.snapshots.complete(int(step)):
        draft.snapshots = snapshot_catalog.without(draft.snapshots, int(step))
        draft.emit("SnapshotVoid", f"the snapshot of step {step} cannot be read: {error.cause}", warning=True)


def _begin_recovery(draft: Draft, kind: ProcessKind) -> None:
    held = draft.job.recovery or Recovery(kind=kind, since_s=draft.now.mono_s)
    worst = ProcessKind.PARTITION if ProcessKind.PARTITION in (kind, held.kind) else ProcessKind.TRAINER
    draft.update(recovery=Recovery(kind=worst, since_s=held.since_s))


def mark_suspects(draft: Draft, view: View) -> None:
    """Mark the trainers that are alive but make no progress: others compute their shards until they recover. A wrong
    suspicion costs nothing: what two trainers compute counts once."""
    cut = process_losses.find_cut(draft.job, view.processes, view.now)
    for placement in draft.job.trainers:
        process = view.processes.get(placement.process_id(draft.job.job_id))
        suspicion = process.suspicion if process is not None and placement.active else ""
        if not suspicion and placement.active and placement.rank in cut.trainers:
            suspicion = "cut off"
        if bool(suspicion) == placement.suspect:
            continue
        draft.set_placement(replace(placement, suspect=bool(suspicion)))
        if suspicion:
            what = _SUSPICIONS.get(suspicion) or process_losses.cannot_reach(cut.reports[placement.name])
            draft.emit("TrainerSuspect", f"{placement.name} on {placement.node_id} {what}", warning=True)
            _begin_recovery(draft, placement.kind)
        elif placement.active:
            draft.emit("TrainerBack", f"{placement.name} on {placement.node_id} recovered")


def fill_placements(draft: Draft, view: View) -> None:
    """Assign nodes to empty placements, and add trainers when the job may grow. Nothing for a job about to end."""
    job = draft.job
    if job.stopping or (job.finished is not None and all(placement.placed for placement in job.partitions)):
        return
    excluded = draft.excluded(view.nodes)
    for placement in job.placements:
        if not placement.placed and (node := _find_node(draft, view, placement, excluded)):
            draft.assign_node(placement, node)
    if not view.grow or any(not placement.placed for placement in draft.job.trainers):
        return
    while len(draft.job.trainers) < max_trainers(job.spec):
        node = choose_node(draft.job, view.nodes, ProcessKind.TRAINER, excluded)
        if node is None:
            return
        draft.add_trainer(node, "which has room")


def _find_node(draft: Draft, view: View, placement: Placement, excluded: frozenset[str]) -> NodeView | None:
    """A node for an empty placement. A standby avoids its partition's node; a partition may displace a standby."""
    if placement.standby:
        partition = draft.job.placement(placement.kind, placement.rank)
        if partition is None or not partition.placed:
            return None
        return _choose(draft, view, placement, excluded | {partition.node_id})
    node = _choose(draft, view, placement, excluded)
    if node is None and placement.kind is ProcessKind.PARTITION:
        return _preempt_standby(draft, view, excluded)
    return node


def _choose(draft: Draft, view: View, placement: Placement, excluded: frozenset[str]) -> NodeView | None:
    """A node for an empty placement, preferably where it was before, but not where it failed, least of all where it
    failed last."""
    failed_on, kind, last = placement.failed_on, placement.kind, placement.last_node_id
    for avoided in dict.fromkeys((failed_on, failed_on[-1:], ())):
        if node := choose_node(draft.job, view.nodes, kind, excluded.union(avoided), last):
            return node
    return None


def _preempt_standby(draft: Draft, view: View, excluded: frozenset[str]) -> NodeView | None:
    """Make room for a partition by ending a standby: steps need the partition only."""
    for placement in sorted(draft.job.standbys, key=lambda placement: (placement.synced, placement.rank)):
        node = view.nodes.get(placement.node_id)
        if placement.placed and node is not None and node.ready and node.node_id not in excluded:
            message = f"{placement.title} on {placement.node_id} makes room for a partition"
            draft.emit("StandbyLost", message, warning=True)
            draft.vacate(placement)
            return node
    return None


def activate_ready(draft: Draft, view: View) -> None:
    """Activate every process that became ready after the first plan, or exclude its node and say why."""
    if draft.job.plan is None:
        return
    for placement in draft.job.placements:
        if placement.active or not placement.placed:
            continue
        facts = ready_facts(placement, draft.job, view.processes)
        if facts is None:
            continue
        why = _unfit(draft.job, facts)
        if why:
            draft.exclude(placement.node_id, placement.incarnation, why)
            draft.vacate(placement)
            continue
        draft.set_placement(facts.activate(placement))
        draft.emit(f"{_event_name(placement)}Ready", f"{placement.title} on {placement.node_id} is ready")


def _unfit(job: Job, facts: TrainerFacts | PartitionFacts) -> str:
    if isinstance(facts, PartitionFacts):
        return numerics.differs(job.numerics_mode, job.optimizer_class, facts)
    if facts.layout_sha256 != job.layout_sha256:
        return "it built another model than the job's"
    if facts.data_fingerprint != job.data_fingerprint:
        return "its data differ from the job's"
    is_alike = facts.numerics_class == job.numerics_class
    if is_alike and len({facts.microbatch_digest, job.microbatch_digest} - {""}) > 1:
        return "it computes other bits of the first microbatch than the job's first trainer did"
    return numerics.differs(job.numerics_mode, job.numerics_class, facts)
