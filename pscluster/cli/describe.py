"""One job as text, in sections. Pure."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pscluster.cli import formatting as fmt
from pscluster.client.goals import action_of
from pscluster.user_frames import OF_FRAME, place_of

if TYPE_CHECKING:
    from pscluster.client import Event, Job, PartitionPlacement, TrainerPlacement
    from pscluster.client.records import PreflightCheck

_EVENTS_SHOWN = 40
_SLOW = 1.15  # times the median trainer's microbatch: a ratio worth showing


def summary(job: Job, now_s: float) -> str:
    """What `psctl status` prints: state and progress in a few aligned lines."""
    return _aligned(list(_summary(job, now_s)))


def description(job: Job, now_s: float) -> str:
    """What `psctl describe` prints: the summary, then a section for each kind of detail there is."""
    summary = [(key, value) for key, value in _summary(job, now_s) if key != "Reason" or job.error is None]
    sections = [_aligned([*summary, *_identity(job)])]
    for title, body in (
        ("Last error", _error(job)),
        ("Task", _aligned(list(_task(job.spec)))),
        ("Conditions", _conditions(job, now_s)),
        ("Evaluation", _evaluation(job)),
        ("Last plan" if job.ended else "Plan", _plan(job)),
        ("Last transports" if job.ended else "Transports", _transports(job)),
        ("Checks", _checks(job)),
        ("Audits", _audits(job)),
        ("Events", _events(job, now_s)),
        ("Traceback", job.traceback.rstrip()),
    ):
        if body:
            sections.append(f"{title}:\n{textwrap.indent(body, '  ')}")
    return "\n\n".join(sections)


def _summary(job: Job, now_s: float) -> Iterator[tuple[str, str]]:
    yield "Name", job.job_id
    yield "State", job.state
    if job.reason:
        yield "Reason", job.reason
    yield "Step", f"{job.step} of {job.final_step}" if job.final_step else str(job.step)
    yield "Loss", fmt.number(job.loss)
    yield "Workers", f"{job.workers_active} active of {job.workers_wanted}"
    if not job.ended and job.steps_per_s > 0:
        yield "Speed", speed(job)
        yield "Time left", fmt.duration(eta_s(job))
    yield "Age", fmt.age(job.created_s, now_s)
    if job.started_s:
        yield "Ran for", fmt.duration((job.ended_s or now_s) - job.started_s)


def speed(job: Job) -> str:
    """Rates over the last seconds. Tokens (the task's weight) only where they differ from samples."""
    parts = [f"{fmt.count(job.steps_per_s)} steps/s", f"{fmt.count(job.samples_per_s)} samples/s"]
    if counts_tokens(job):
        parts.append(f"{fmt.count(job.weight_per_s)} tokens/s")
    return ", ".join(parts)


def counts_tokens(job: Job) -> bool:
    """Whether the task's weight is not the number of samples."""
    return job.weight_per_s > 0 and abs(job.weight_per_s - job.samples_per_s) > 0.01 * job.samples_per_s


def eta_s(job: Job) -> float | None:
    """Seconds to the last step at the present speed; None when unknown."""
    if not job.final_step or job.steps_per_s <= 0:
        return None
    return max(0, job.final_step - job.step) / job.steps_per_s


def _identity(job: Job) -> Iterator[tuple[str, str]]:
    yield "Created", fmt.clock(job.created_s)
    yield "Generation", str(job.generation)
    parameters, bundle = (digest and f"sha256:{digest}" for digest in (job.parameters_sha256, job.bundle_sha256))
    optional = {"Numerics": job.numerics, "Parameters": parameters, "Bundle": bundle}
    optional |= {"Snapshots": job.store, "Directory": job.directory}
    yield from ((name, value) for name, value in optional.items() if value)


def _task(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    task, train = spec.get("task", {}), spec.get("train", {})
    if not task or not train:
        return
    yield "Entrypoint", str(task.get("entrypoint", ""))
    for key, value in task.get("args", {}).items():
        yield f"  {key}", str(value)
    if spec.get("data", {}).get("uri"):
        yield "Data", spec["data"]["uri"]
    batch, microbatch = train.get("global_batch", 0), train.get("microbatch", 1)
    drops = "; drop_last: the checks show how many are left out" if spec.get("data", {}).get("drop_last") else ""
    yield "Batch", f"{batch} = {batch // microbatch} shards x {microbatch}{drops}"
    optimizer = train.get("optimizer", {})
    yield "Optimizer", f"{optimizer.get('name')}, lr {optimizer.get('lr')}"
    durability = spec.get("durability", {})
    yield "Durability", f"{durability.get('tier')} every {durability.get('every_steps')} steps"


def _conditions(job: Job, now_s: float) -> str:
    rows = [[c.type, str(c.status), fmt.age(c.since_s, now_s), c.reason, c.message] for c in job.conditions]
    return fmt.table(("TYPE", "STATUS", "SINCE", "REASON", "MESSAGE"), rows) if rows else ""


def _evaluation(job: Job) -> str:
    if not job.metrics:
        return ""
    lines = [("Step", str(job.metrics_step))]
    lines += [(name, fmt.number(value)) for name, value in sorted(job.metrics.items())]
    if job.best:
        metric = job.spec.get("evaluate", {}).get("metric", "loss")
        lines.append(("Best", f"{metric} {fmt.number(job.best.value)} at step {job.best.step}"))
    return _aligned(lines)


def _plan(job: Job) -> str:
    if job.plan is None:
        return ""
    median_s = _median_s(job.plan.trainers)
    rows = [_trainer(t, median_s) for t in job.plan.trainers]
    for p in job.plan.partitions:
        rows += _partition(p)
    head = f"Generation {job.plan.generation}"
    if job.plan.resume_step:
        head += f", resumed from step {job.plan.resume_step}"
    columns = ("PROCESS", "NODE", "ATTEMPT", "ROLE", "DEVICE", "MICROBATCH", "SHARDS OR ADDRESS")
    return head + "\n" + fmt.table(columns, rows)


def _median_s(placements: Sequence[TrainerPlacement]) -> float:
    """Seconds of the median trainer's microbatch; 0 before any is measured."""
    known = [placement.microbatch_s for placement in placements if placement.active and placement.microbatch_s]
    return statistics.median_low(known) if known else 0.0


def _trainer(placement: TrainerPlacement, median_s: float) -> list[str]:
    """A trainer's row; a slow one's microbatch with how many times the median one's: "0.21 s, 2.0x"."""
    name, role = f"trainer-{placement.rank}", "active" if placement.active else "standing by"
    time = ""
    if placement.active and placement.microbatch_s:
        ratio = placement.microbatch_s / median_s if median_s else 1.0
        time = f"{placement.microbatch_s:.3g} s" + (f", {ratio:.1f}x" if ratio >= _SLOW else "")
    runs = [str(first) if run == 1 else f"{first}-{first + run - 1}" for first, run in placement.shards]
    shards = "shards " + ",".join(runs) if runs else "none"
    return [name, placement.node_id, str(placement.attempt), role, placement.device or "", time, shards]


def _partition(placement: PartitionPlacement) -> list[list[str]]:
    name = f"partition-{placement.index}"
    role = "coordinator" if placement.index == 0 else ""
    rows = [[name, placement.node_id, str(placement.attempt), role, "", "", " ".join(placement.addresses)]]
    if placement.standby is not None:
        s = placement.standby
        role = "standby, in sync" if s.in_sync else "standby, catching up"
        rows.append([name, s.node_id, str(s.attempt), role, "", "", " ".join(s.addresses)])
    return rows


def _transports(job: Job) -> str:
    by_transport: dict[str, list[str]] = {}
    for c in job.connections:
        by_transport.setdefault(c.transport, []).append(f"{c.trainer}-{c.partition}")
    lines = [(name, f"trainer-partition {', '.join(pairs)}") for name, pairs in sorted(by_transport.items())]
    return _aligned(lines)


def _checks(job: Job) -> str:
    rows = [[c.node_id, c.name, _result(c), c.detail] for c in job.checks]
    return fmt.table(("NODE", "CHECK", "RESULT", "DETAIL"), rows) if rows else ""


def _result(check: PreflightCheck) -> str:
    if not check.ok:
        return "FAILED"
    return "warning" if check.warning else "ok"


def _audits(job: Job) -> str:
    """What audits found, and up to which step they vouch for each node; empty where nothing is audited."""
    audits = job.audits
    done = audits.equal + audits.differing
    if not (done or audits.unfinished or job.spec.get("audit", {}).get("share")):
        return ""
    head = f"{done} done, {audits.differing} differing, {audits.unfinished} unfinished"
    lines = [(own.node_id, f"step {own.step}" + (", by itself" if own.alone else "")) for own in audits.vouched]
    return head + ("\nvouched for up to\n" + textwrap.indent(_aligned(lines), "  ") if lines else "")


def _events(job: Job, now_s: float) -> str:
    rows = [
        [fmt.age(e.time_s, now_s), "Warning" if e.warning else "Normal", e.reason, _message(e, job)]
        for e in job.events[-_EVENTS_SHOWN:]
    ]
    return fmt.table(("AGE", "TYPE", "REASON", "MESSAGE"), rows) if rows else ""


def _message(event: Event, job: Job) -> str:
    """An event's message; of the error that ended the job only its code, since it has a section of its own."""
    return job.error.code if event.reason == "Failed" and job.error is not None else event.message


def _error(job: Job) -> str:
    if job.error is None:
        return ""
    # A preflight table has several lines: only the cause keeps its line breaks.
    lines = [f"{job.error.code}: {job.error.cause}"]
    if frame := place_of(job.error.details):
        lines.append(f"at: {fmt.one_line(frame)}")
    if action := action_of(job):
        lines.append(f"hint: {action}")
    lines += [f"{key}: {value}" for key, value in sorted(job.error.details.items()) if key not in OF_FRAME]
    return "\n".join(lines)


def _aligned(pairs: list[tuple[str, str]]) -> str:
    width = max((len(key) for key, _ in pairs), default=0) + 1
    return "\n".join(f"{key + ':':<{width}} {fmt.one_line(value)}".rstrip() for key, value in pairs)
