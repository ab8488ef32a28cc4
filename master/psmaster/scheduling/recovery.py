"""The stages of reconciliation for processes that are lost, replaced and join again. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from pscluster.devices import CPU
from psmaster.model import snapshot_catalog
from psmaster.model.job import ErrorInfo, Recovery
from psmaster.model.membership import Role
from psmaster.model.plan import ProcessKind, Seat
from psmaster.model.process import Loss, PartitionFacts, TrainerFacts, failure_of, loss_of, out_of_reach, ready_facts
from psmaster.scheduling import numerics, reachability, retry, standbys
from psmaster.scheduling.admission import NodeView, choose_node, max_trainers
from psmaster.scheduling.draft import Draft, View

_LOOKS = {"silent": "no longer beats", "stalled": "has been at one microbatch for far too long"}


def lose(draft: Draft, view: View) -> None:
    """Empty the seats whose process is gone. FAILED when one seat loses too many without a new step in between."""
    cut = reachability.judge(draft.job, view.processes, view.now)
    for seat in (*draft.job.standbys, *draft.job.working):
        loss = loss_of(seat, draft.job, view) or _out_of_reach(draft, view, seat, cut)
        if seat.standby and loss is not None:
            standbys.lose(draft, view, seat, loss)
            continue
        if loss is None or (draft.job.finished is not None and seat.kind is ProcessKind.TRAINER):
            continue
        if failure_of(seat, draft.job, view.processes) is not None:
            continue  # it ends the job once the others' failures are heard
        draft.say(f"{seat.kind.value.capitalize()}Lost", loss.message, warning=True)
        _void_snapshot(draft, loss.problem)
        losses = seat.losses + loss.counted
        if losses > view.limits.max_losses and _spared(draft, seat):
            why = f"{seat.name} was lost {losses} times before it was ready, the last time there"
            draft.exclude(seat.node_id, seat.incarnation, why)
            losses = 0
        if losses > view.limits.max_losses:
            cause = f"{loss.problem.cause}; {seat.name} was lost {losses} times without a new step in between"
            draft.fail(replace(loss.problem, cause=cause))
            return
        if draft.job.plan is not None and seat.active:
            _begin_recovery(draft, seat.kind)
        retry.unseat(draft, view, seat, loss, losses)
        if seat.kind is ProcessKind.PARTITION:
            standbys.succeed(draft, seat, losses)
        if loss.cause == "reach":
            _place_elsewhere(draft, view, seat)


def _out_of_reach(draft: Draft, view: View, seat: Seat, cut: reachability.Cut) -> Loss | None:
    """A partition that others cannot reach, and that can be elsewhere."""
    if seat.kind is not ProcessKind.PARTITION or seat.standby or seat.rank not in cut.partitions:
        return None
    standby = draft.job.standby(seat.rank)
    if _elsewhere(draft, view, seat) is None and (standby is None or not standby.synced):
        return None
    return out_of_reach(seat, reachability.words(cut.reports))


def _elsewhere(draft: Draft, view: View, seat: Seat) -> NodeView | None:
    return _choose(draft, view, seat, draft.excluded(view.nodes) | {seat.node_id})


def _place_elsewhere(draft: Draft, view: View, lost: Seat) -> None:
    """A seat whose process was out of reach, unless a standby has it: not where it was. Later it may be there again:
    networks heal, and one that has not is found again."""
    seat = draft.job.seat(lost.kind, lost.rank)
    node = _elsewhere(draft, view, lost)
    if seat is not None and not seat.placed and node is not None:
        draft.place(lost.kind, lost.rank, node)


def _spared(draft: Draft, seat: Seat) -> bool:
    """Whether a running job can do without the node where a newcomer never becomes ready."""
    others = any(own.active for own in draft.job.trainers)
    return draft.job.plan is not None and seat.kind is ProcessKind.TRAINER and not seat.active and others


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
    for seat in draft.job.trainers:
        process = view.processes.get(seat.process_id(draft.job.job_id))
        suspicion = process.suspicion if process is not None and seat.active else ""
        if not suspicion and seat.active and seat.rank in cut.trainers:
            suspicion = "cut off"
        if bool(suspicion) == seat.suspect:
            continue
        draft.put(replace(seat, suspect=bool(suspicion)))
        if suspicion:
            what = _LOOKS.get(suspicion) or reachability.cannot_reach(cut.reports[seat.name])
            draft.say("TrainerSuspect", f"{seat.name} on {seat.node_id} {what}", warning=True)
            _begin_recovery(draft, seat.kind)
        elif seat.active:
            draft.say("TrainerBack", f"{seat.name} on {seat.node_id} gets on again")


def place(draft: Draft, view: View) -> None:
    """Give empty seats a node, and the job more seats when it may grow. Nothing new for a job that is about to end."""
    job = draft.job
    if job.stopping or (job.finished is not None and all(seat.placed for seat in job.partitions)):
        return
    excluded = draft.excluded(view.nodes)
    for seat in job.seats:
        if not seat.placed and (node := _room(draft, view, seat, excluded)):
            draft.place(seat.kind, seat.rank, node, standby=seat.standby)
    if not view.grow or any(not seat.placed for seat in draft.job.trainers):
        return
    while len(draft.job.trainers) < max_trainers(job.spec):
        seat = Seat(kind=ProcessKind.TRAINER, rank=max((own.rank for own in draft.job.trainers), default=-1) + 1)
        node = _choose(draft, view, seat, excluded)
        if node is None:
            return
        draft.place(seat.kind, seat.rank, node)
        draft.say("TrainerAdded", f"{seat.name} starts on {node.node_id}, which has room")


def _room(draft: Draft, view: View, seat: Seat, excluded: frozenset[str]) -> NodeView | None:
    """A node for an empty seat: a standby's is not its partition's; a standby makes room for a partition."""
    if seat.standby:
        barred = standbys.barred(draft, seat)
        return None if barred is None else _choose(draft, view, seat, excluded | barred)
    node = _choose(draft, view, seat, excluded)
    if node is None and seat.kind is ProcessKind.PARTITION:
        return standbys.give_way(draft, view, excluded)
    return node


def _choose(draft: Draft, view: View, seat: Seat, excluded: frozenset[str]) -> NodeView | None:
    taken = Counter(own.node_id for own in draft.job.seats if own.placed)
    device = draft.job.spec.workers.device if seat.kind is ProcessKind.TRAINER else CPU
    for shunned in retry.shunned(seat):
        node = choose_node(view.nodes, Role.of(seat.kind), taken, excluded | shunned, seat.last_node_id, device)
        if node is not None:
            return node
    return None


def join(draft: Draft, view: View) -> None:
    """Count on every process that became ready after the first plan, or leave its node out and say why."""
    if draft.job.plan is None:
        return
    for seat in draft.job.seats:
        if seat.active or not seat.placed:
            continue
        facts = ready_facts(seat, draft.job, view.processes)
        if facts is None:
            continue
        why = _unfit(draft, seat, facts)
        if why:
            draft.exclude(seat.node_id, seat.incarnation, why)
            draft.unseat(seat)
            continue
        draft.put(facts.seated(seat))
        kind = "Standby" if seat.standby else seat.kind.value.capitalize()
        draft.say(f"{kind}Ready", f"{seat.title} on {seat.node_id} is ready")


def _unfit(draft: Draft, seat: Seat, facts: TrainerFacts | PartitionFacts) -> str:
    job = draft.job
    report = numerics.Report(node_id=seat.node_id, numerics_class=facts.numerics_class, detail=facts.numerics_detail)
    if isinstance(facts, PartitionFacts):
        return numerics.differs(job.numerics_mode, job.optimizer_class, report)
    if facts.layout_sha256 != job.layout_sha256:
        return "it built another model than the job's"
    if facts.data_fingerprint != job.data_fingerprint:
        return "its data differ from the job's"
    return numerics.differs(job.numerics_mode, job.numerics_class, report)
