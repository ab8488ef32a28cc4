"""What a trainer is to do, as a pure function of the plan, the coordinator's directive and what it has done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from pscluster.step.summary import Statistics
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.protocol import Directive

WorkKey = tuple[int, int, int, str]  # timeline, version, holders, action
Done = Mapping[WorkKey, Set[int]]  # shards that were computed, by what they were computed for


@dataclass(frozen=True, kw_only=True)
class Work:
    """`shards`: this trainer's, not done yet for (timeline, version, action).

    `timeline`: generation of the newest restore; `version`: of the parameters, the step that starts from them.
    `holders`: generation since which those that collect the work are the same. Where a standby has taken over, what its
    partition had collected of the open step is gone, and the work is owed again; the others drop it as a duplicate.
    `action`: "initialise" (give the first values to `shards`, here partitions), "train", "evaluate", "finalise"
    (turn `statistics` into metrics), "finish" (digest the final values)."""

    timeline: int
    generation: int
    version: int
    action: str
    holders: int = 0
    shards: tuple[int, ...] = ()
    statistics: Statistics | None = None

    @property
    def key(self) -> WorkKey:
        return (self.timeline, self.version, self.holders, self.action)


def shards_of(plan: Plan, rank: int) -> list[int]:
    """The shards that a plan gives to a trainer, lowest first: a left sibling is added to while its right one comes,
    never the other way round, when autograd may still hold it."""
    runs = [run for placement in plan.trainers if placement.rank == rank for run in placement.shards]
    return sorted(shard for run in runs for shard in range(run.first, run.first + run.count))


def find_work(
    plan: Plan,
    directive: Directive | None,
    merged: tuple[int, Statistics] | None,
    empty_partitions: Set[int],
    rank: int,
    done: Done,
) -> Work | None:
    """What is left to do, or None.

    `merged`: version and root of a complete evaluation; `empty_partitions` hold no values yet."""
    mine = shards_of(plan, rank)
    base = Work(timeline=plan.restore_generation, generation=plan.generation, version=0, action="")
    if directive is None:
        first = min((placement.rank for placement in plan.trainers if placement.active), default=-1)
        may = empty_partitions and plan.resume_step == 0 and first == rank
        return _left(replace(base, action="initialise"), [min(empty_partitions)] if may else [], done)
    if directive.action == "hold":
        return None  # the job rests, to go on from this version elsewhere
    holders = plan.moved_generation if directive.action == "train" else plan.coordinator_generation
    base = replace(base, version=directive.version, action=directive.action, holders=holders)
    if directive.action == "finish":
        return _left(base, [0] if 0 in mine else [], done)
    found = _left(base, mine, done)
    if found is None and directive.action == "evaluate" and merged is not None and merged[0] == directive.version:
        return _left(replace(base, action="finalise", statistics=merged[1]), [0] if 0 in mine else [], done)
    return found


def _left(work: Work, shards: Sequence[int], done: Done) -> Work | None:
    left = tuple(shard for shard in shards if shard not in done.get(work.key, ()))
    return replace(work, shards=left) if left else None
