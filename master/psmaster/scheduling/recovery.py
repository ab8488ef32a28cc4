"""The stages of reconciliation for processes that are lost, replaced and join again. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from pscluster.devices import CPU
from psmaster.model import snapshot_catalog
from psmaster.model.job import ErrorInfo, Recovery
from psmaster.model.membership import Role
from psmaster.model.plan import Placement, ProcessKind
from psmaster.model.process import Loss, PartitionFacts, TrainerFacts, failure_of, loss_of, out_of_reach, ready_facts
from psmaster.scheduling import numerics, reachability, retry, standbys
from psmaster.scheduling.admission import NodeView, choose_node, max_trainers
from psmaster.scheduling.draft import Draft, View

_LOOKS = {"silent": "no longer beats", "stalled": "has been at one microbatch for far too long"}


def lose(draft: Draft, view: View) -> None:
    """Empty the placements whose process is gone. FAILED when one placement loses too many without a new step in
    between."""
    cut = reachability.judge(draft.job, view.processes, view.now)
    for placement in (*draft.job.standbys, *draft.job.working):
        loss = loss_of(placement, draft.job, view) or _out_of_reach(draft, view, placement, cut)
        if placement.standby and loss is not None:
            standbys.lose(draft, view, placement, loss)
            continue
        if loss is None or (draft.job.finished is not None and placement.kind is ProcessKind.TRAINER):
            continue
        if failure_of(placement, draft.job, view.processes) is not None:
            continue  # it ends the job once the others' failures are heard
        draft.say(f"{placement.kind.value.capitalize()}Lost", loss.message, warning=True)
        _void_snapshot(draft, loss.problem)
        losses = placement.losses + loss.counted
        if losses > view.limits.max_losses and _spared(draft, placement):
            why = f"{placement.name} was lost {losses} times before it was ready, the last time there"
            draft.exclude(placement.node_id, placement.incarnation, why)
            losses = 0
        if losses > view.limits.max_losses:
            cause = f"{loss.problem.cause}; {placement.name} was lost {losses} times without a new step in between"
            draft.fail(replace(loss.problem, cause=cause))
            return
        if draft.job.plan is not None and placement.active:
            _begin_recovery(draft, placement.kind)
        retry.unseat(draft, view, placement, loss, losses)
        if placement.kind is ProcessKind.PARTITION:
            standbys.succeed(draft, placement, losses)
        if loss.cause == "reach":
            _place_elsewhere(draft, view, placement)


def _out_of_reach(draft: Draft, view: View, placement: Placement, cut: reachability.Cut) -> Loss | None:
    """A partition that others cannot reach, and that can be elsewhere."""
    if placement.kind is not ProcessKind.PARTITION or placement.standby or placement.rank not in cut.partitions:
        return None
    standby = draft.job.standby(placement.rank)
    if _elsewhere(draft, view, placement) is None and (standby is None or not standby.synced):
        return None
    return out_of_reach(placement, reachability.words(cut.reports))


def _elsewhere(draft: Draft, view: View, placement: Placement) -> NodeView | None:
    return _choose(draft, view, placement, draft.excluded(view.nodes) | {placement.node_id})


def _place_elsewhere(draft: Draft, view: View, lost: Placement) -> None:
    """A placement whose process was out of reach, unless a standby has it: not where it was. Later it may be there
    again: networks heal, and one that has not is found again."""
    placement = draft.job.placement(lost.kind, lost.rank)
    node = _elsewhere(draft, view, lost)
    if placement is not None and not placement.placed and node is not None:
        draft.place(lost.kind, lost.rank, node)


def _spared(draft: Draft, placement: Placement) -> bool:
    """Whether a running job can do without the node where a newcomer never becomes ready."""
    others = any(own.active for own in draft.job.trainers)
    return draft.job.plan is not None and placement.kind is ProcessKind.TRAINER and not placement.active and others


def _void_snapshot(draft: Draft, problem: ErrorInfo) -> None:
    """A partition that cannot read a snapshot names its step: the job then falls back to an older one."""
    step = problem.detail("void_snapshot")
    if step.isdecimal() and draft.snapshots.complete(int(step)):
        draft.snapshots = snapshot_catalog.without(draft.snapshots, int(step))
        draft.say("SnapshotVoid", f"the snapshot of step {step} cannot be read: {problem.cause}", warning=True)


def _begin_recovery(draft: Draft, kind: ProcessKind) -> None:
    held = draft.job.recovery
    since = held.since_s if held else draft.now.mono_s
    worst = (
        ProcessKind.PARTITION if ProcessKind.PARTITION in (kind, held.kind if held else kind) else ProcessKind.TRAINER
    )
    draft.update(recovery=Recovery(kind=worst, since_s=since))


def suspect(draft: Draft, view: View) -> None:
    """Mark the trainers that live and do not get on: others compute their shards until they are heard again.

    Nothing is lost by an error here, nor by a late return: what two compute counts once."""
    cut = reachability.judge(draft.job, view.processes, view.now)
    for placement in draft.job.trainers:
        process = view.processes.get(placement.process_id(draft.job.job_id))
        suspicion = process.suspicion if process is not None and placement.active else ""
        if not suspicion and placement.active and placement.rank in cut.trainers:
            suspicion = "cut off"
        if bool(suspicion) == placement.suspect:
            continue
        draft.put(replace(placement, suspect=bool(suspicion)))
        if suspicion:
            what = _LOOKS.get(suspicion) or reachability.cannot_reach(cut.reports[placement.name])
            draft.say("TrainerSuspect", f"{placement.name} on {placement.node_id} {what}", warning=True)
            _begin_recovery(draft, placement.kind)
        elif placement.active:
            draft.say("TrainerBack", f"{placement.name} on {placement.node_id} gets on again")


def place(draft: Draft, view: View) -> None:
    """Give empty placements a node, and the job more placements when it may grow. Nothing new for a job that is about
    to end."""
    job = draft.job
    if job.stopping or (job.finished is not None and all(placement.placed for placement in job.partitions)):
        return
    excluded = draft.excluded(view.nodes)
    for placement in job.placements:
        if not placement.placed and (node := _room(draft, view, placement, excluded)):
            draft.place(placement.kind, placement.rank, node, standby=placement.standby)
    if not view.grow or any(not placement.placed for placement in draft.job.trainers):
        return
    while len(draft.job.trainers) < max_trainers(job.spec):
        placement = Placement(
            kind=ProcessKind.TRAINER, rank=max((own.rank for own in draft.job.trainers), default=-1) + 1
        )
        node = _choose(draft, view, placement, excluded)
        if node is None:
            return
        draft.place(placement.kind, placement.rank, node)
        draft.say("TrainerAdded", f"{placement.name} starts on {node.node_id}, which has room")


def _room(draft: Draft, view: View, placement: Placement, excluded: frozenset[str]) -> NodeView | None:
    """A node for an empty placement: a standby's is not its partition's; a standby makes room for a partition."""
    if placement.standby:
        excluded_by_standby = standbys.excluded_by_standby(draft, placement)
        return None if excluded_by_standby is None else _choose(draft, view, placement, excluded | excluded_by_standby)
    node = _choose(draft, view, placement, excluded)
    if node is None and placement.kind is ProcessKind.PARTITION:
        return standbys.preempt_standby(draft, view, excluded)
    return node


def _choose(draft: Draft, view: View, placement: Placement, excluded: frozenset[str]) -> NodeView | None:
    taken = Counter(own.node_id for own in draft.job.placements if own.placed)
    device = draft.job.spec.workers.device if placement.kind is ProcessKind.TRAINER else CPU
    for avoided in retry.avoided(placement):
        node = choose_node(
            view.nodes, Role.of(placement.kind), taken, excluded | avoided, placement.last_node_id, device
        )
        if node is not None:
            return node
    return None


def join(draft: Draft, view: View) -> None:
    """Count on every process that became ready after the first plan, or leave its node out and say why."""
    if draft.job.plan is None:
        return
    for placement in draft.job.placements:
        if placement.active or not placement.placed:
            continue
        facts = ready_facts(placement, draft.job, view.processes)
        if facts is None:
            continue
        why = _unfit(draft, placement, facts)
        if why:
            draft.exclude(placement.node_id, placement.incarnation, why)
            draft.unseat(placement)
            continue
        draft.put(facts.seated(placement))
        kind = "Standby" if placement.standby else placement.kind.value.capitalize()
        draft.say(f"{kind}Ready", f"{placement.title} on {placement.node_id} is ready")


def _unfit(draft: Draft, placement: Placement, facts: TrainerFacts | PartitionFacts) -> str:
    job = draft.job
    report = numerics.Report(
        node_id=placement.node_id, numerics_class=facts.numerics_class, detail=facts.numerics_detail
    )
    if isinstance(facts, PartitionFacts):
        return numerics.differs(job.numerics_mode, job.optimizer_class, report)
    if facts.layout_sha256 != job.layout_sha256:
        return "it built another model than the job's"
    if facts.data_fingerprint != job.data_fingerprint:
        return "its data differ from the job's"
    return numerics.differs(job.numerics_mode, job.numerics_class, report)
