"""The start of a job: from placements with processes on their way to the first plan. Pure."""

from __future__ import annotations

import json
from dataclasses import replace

from pscluster.errors import DataError, ImpureError, LayoutError
from psmaster.model.job import ErrorInfo, Job
from psmaster.model.plan import Placement
from psmaster.model.process import PartitionFacts, TrainerFacts, ready_facts
from psmaster.scheduling import numerics
from psmaster.scheduling.draft import Draft, View
from psmaster.scheduling.planner import make_plan

ReadyTrainers = list[tuple[Placement, TrainerFacts]]
ReadyPartitions = list[tuple[Placement, PartitionFacts]]


def first_plan(draft: Draft, view: View) -> None:
    """Plan a job that has none, once all its processes are ready and agree. FAILED when they built different things."""
    job = draft.job
    if job.plan is not None or job.stopping:
        return
    trainers, partitions = ready(draft, view)
    placed = [placement for placement in job.trainers if placement.placed]
    if len(trainers) < max(len(placed), job.spec.workers.min) or len(partitions) < len(job.partitions):
        return
    error = disagreement(job, trainers)
    if error is not None:
        draft.fail(error)
        return
    if _settle_numerics(draft, trainers, partitions):
        _adopt(draft, trainers, partitions)
        make_plan(draft, view, restore=True)


def ready(draft: Draft, view: View) -> tuple[ReadyTrainers, ReadyPartitions]:
    """The placements whose process is ready, with what it reported."""
    trainers: ReadyTrainers = []
    partitions: ReadyPartitions = []
    for placement in draft.job.working:
        facts = ready_facts(placement, draft.job, view.processes) if placement.placed else None
        if isinstance(facts, TrainerFacts):
            trainers.append((placement, facts))
        elif isinstance(facts, PartitionFacts):
            partitions.append((placement, facts))
    return trainers, partitions


def disagreement(job: Job, trainers: ReadyTrainers) -> ErrorInfo | None:
    """The error when trainers built different models, see different data or compute other bits, than each other or than
    what the job's snapshots hold."""
    first_placement, first = trainers[0]
    where = data_where = f"{first_placement.name} on {first_placement.node_id}"
    wanted_json, wanted, data = first.layout_json, first.layout_sha256, first.data_fingerprint
    if job.layout_sha256:
        wanted_json, wanted, where = job.layout_json, job.layout_sha256, "the job's snapshots"
    if job.data_fingerprint:
        data, data_where = job.data_fingerprint, "the job's earlier steps"
    for placement, facts in trainers:
        name = f"{placement.name} on {placement.node_id}"
        if facts.layout_sha256 != wanted:
            difference = first_difference(wanted_json, facts.layout_json)
            return ErrorInfo.of(LayoutError(f"{name} built another model than {where}: {difference}"))
        if facts.data_fingerprint != data:
            found = facts.data_fingerprint[:12]
            return ErrorInfo.of(DataError(f"{name} sees other data ({found}) than {data_where} ({data[:12]})"))
    return _other_bits(trainers)


def _other_bits(trainers: ReadyTrainers) -> ErrorInfo | None:
    """The error when trainers of one numerics class computed different bits of the job's first microbatch."""
    known: dict[str, tuple[Placement, str]] = {}
    for placement, facts in trainers:
        if not facts.microbatch_digest:
            continue
        first, digest = known.setdefault(facts.numerics_class, (placement, facts.microbatch_digest))
        if facts.microbatch_digest != digest:
            names = [f"{one.name} on {one.node_id}" for one in (placement, first)]
            error = ImpureError(
                f"impure: {names[0]} and {names[1]} compute different bits of the same microbatch, and each the same "
                "bits again",
                action="look for what differs between processes (process ids, unseeded generators, environment, files "
                "of a node), or declare train.numerics: mixed, which promises no bits; if there is none, test the "
                "machines",
                details={"part": "process", "differs": "the first microbatch"},
            )
            return ErrorInfo.of(error)
    return None


def first_difference(left: bytes, right: bytes) -> str:
    """Where two JSON texts differ first, as "path: this is not that"."""
    try:
        return _walk(json.loads(left), json.loads(right), "") or "only in form"
    except ValueError:
        return "the layouts do not parse"


def _walk(left: object, right: object, path: str) -> str:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            if key not in left or key not in right:
                return f"{path}.{key} is only in one of them".lstrip(".")
            if found := _walk(left[key], right[key], f"{path}.{key}"):
                return found
        return ""
    if isinstance(left, list) and isinstance(right, list):
        for index, (one, other) in enumerate(zip(left, right, strict=False)):
            if found := _walk(one, other, f"{path}[{index}]"):
                return found
        return "" if len(left) == len(right) else f"{path.lstrip('.')} has {len(left)} entries, not {len(right)}"
    return "" if left == right else f"{path.lstrip('.') or 'value'}: {left!r:.80} is not {right!r:.80}"


def _settle_numerics(draft: Draft, trainers: ReadyTrainers, partitions: ReadyPartitions) -> bool:
    """Decide the mode; False when a strict job left nodes out and must look again."""
    job = draft.job
    bound = (job.numerics_class, job.optimizer_class) if job.spec.train.numerics == "strict" else ("", "")
    choice = numerics.choose(job.spec.train.numerics, trainers, partitions, bound)
    for node_id, why in choice.left_out:
        placements = [placement for placement in draft.job.placements if placement.node_id == node_id]
        draft.exclude(node_id, placements[0].incarnation, why)
        for placement in placements:
            draft.vacate(placement)
    if choice.left_out:
        return False
    if job.numerics_mode and (job.numerics_mode, job.numerics_class) != (choice.mode, choice.trainer_class):
        draft.emit("NumericsChanged", f"was {job.numerics}; is {choice.explanation}", warning=True)
    draft.update(
        numerics_mode=choice.mode,
        numerics_class=choice.trainer_class,
        optimizer_class=choice.partition_class,
        numerics=choice.explanation,
    )
    return True


def _adopt(draft: Draft, trainers: ReadyTrainers, partitions: ReadyPartitions) -> None:
    """Store what the first trainer reported with the job, and activate all placements. A warning of the preflight
    becomes an event, once for all trainers that have it."""
    first = trainers[0][1]
    for detail in dict.fromkeys(check.detail for _, facts in trainers for check in facts.checks if check.warning):
        draft.emit("PreflightWarning", detail, warning=True)
    draft.update(
        layout_json=first.layout_json,
        layout_sha256=first.layout_sha256,
        data_fingerprint=first.data_fingerprint,
        microbatch_digest=first.microbatch_digest,
        final_step=first.final_step,
        checks=tuple(replace(check, node_id=own.node_id) for own, facts in trainers for check in facts.checks),
        deadline_s=None,
    )
    everything: list[tuple[Placement, TrainerFacts | PartitionFacts]] = [*trainers, *partitions]
    for placement, facts in everything:
        draft.set_placement(facts.activate(placement))
