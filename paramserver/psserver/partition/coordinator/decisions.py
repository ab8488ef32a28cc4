"""What the job does next at a version, as pure functions of the spec and the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pscluster.job.spec import JobSpec
from pscluster.step.summary import Summary
from pscluster.wire.partition_protocol import DecisionKind
from pscluster.wire.protocol import Action
from psserver.partition.step.commit import CommitDecision, Vote, clip_coefficient, global_norm


def evaluates_at(version: int, spec: JobSpec, final_step: int) -> bool:
    """Whether the version is evaluated: every `evaluate.every_steps`, and at the end."""
    every = spec.evaluate.every_steps
    return version > 0 and (version == final_step or (every is not None and version % every == 0))


def snapshots_at(version: int, spec: JobSpec, final_step: int) -> bool:
    """Whether every partition writes the version: multiples of `durability.every_steps`, evaluations, the end."""
    return version % spec.durability.every_steps == 0 or evaluates_at(version, spec, final_step)


def next_action(
    version: int, spec: JobSpec, final_step: int, *, evaluated: int, saved: int, stop: bool, save: bool = False
) -> Action:
    """What comes at `version`, of which `evaluated` and `saved` are the newest evaluated and written ones.

    A stop takes effect at a version that is written, and so does a rest (`save`); the vote on the next step sees to it
    that there is one."""
    if (stop or save) and saved == version and version < final_step:
        return "finish" if stop else "hold"
    if evaluates_at(version, spec, final_step) and evaluated != version:
        return "evaluate"
    return "finish" if version >= final_step else "train"


def decide(
    votes: Mapping[int, Vote],
    summary: Summary,
    spec: JobSpec,
    final_step: int,
    *,
    generation: int,
    stop: bool,
    save: bool = False,
) -> CommitDecision:
    """The decision on a step from all its votes and its summary; the same wherever and whenever it is reached."""
    step = next(iter(votes.values())).step
    finite = all(vote.finite for vote in votes.values()) and math.isfinite(summary.loss_sum)
    norm = global_norm(votes, summary.weight) if finite else math.nan
    made = step + 1
    snapshot = stop or save or snapshots_at(made, spec, final_step)
    if not finite:
        kind: DecisionKind = "skip" if spec.on_nonfinite == "skip" else "stop"
        return CommitDecision(
            generation=generation, step=step, kind=kind, norm=norm, snapshot=snapshot and kind == "skip", last=stop
        )
    scale = clip_coefficient(norm, spec.train.clip_norm) / summary.weight if summary.weight > 0 else 0.0
    return CommitDecision(
        generation=generation, step=step, kind="commit", scale=scale, norm=norm, snapshot=snapshot, last=stop
    )
