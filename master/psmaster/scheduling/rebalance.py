"""Rebalancing: when shards move from slow trainers to fast ones, by what the trainers measure. Pure.

Any trainer may compute any shard, so moving them changes no bit; what it costs is a new generation. So they move only
for a gain that is worth it, not again at once, and less and less often when one move follows the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pscluster.wire.backoff import delay_s
from psmaster.model.job import Instant, Job, ShardAssignment
from psmaster.model.membership import NodeView, is_draining
from psmaster.model.plan import Placement, counted_on
from psmaster.model.process import MeasuredSpeed, Processes
from psmaster.scheduling.shard_assignment import Runs, least_makespan_s, makespan_s, split_shards

GAIN = 0.10  # of a step's time: what a move must promise
MEASUREMENTS = 2  # of each trainer that has shards, before anything is concluded
STEPS = 2  # committed since shards were last assigned
WAIT_S = 5.0  # since then; doubles with each move that comes soon after the one before
MAX_WAIT_S = 300.0
QUIET = 4  # so many waits without a move, and the next one is the first again
PROBE_S = 30.0  # after so long without a measurement who was too slow gets a shard again; doubles when in vain
MAX_PROBE_S = 600.0
NAMED = 1.15  # how much slower than the median a trainer is that the event names


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Shards are to move. `warning`: a trainer is slow. `probe`: the rank that gets one shard to be measured;
    -1: none."""

    reason: str
    message: str
    assignment: ShardAssignment
    warning: bool = False
    probe: int = -1


def measured_speeds(placements: Iterable[Placement], job_id: str, processes: Processes) -> dict[int, MeasuredSpeed]:
    """What is known of the trainers in these placements, by rank."""
    found = {placement.rank: processes.get(placement.process_id(job_id)) for placement in placements}
    return {rank: process.speed if process else MeasuredSpeed() for rank, process in found.items()}


def microbatch_seconds(speeds: Mapping[int, MeasuredSpeed]) -> dict[int, float]:
    """Seconds a microbatch, by rank; the median for a trainer without measurements. Empty when none has any."""
    known = [speed.microbatch_s for speed in speeds.values() if speed.is_known]
    if not known:
        return {}
    median_s = statistics.median_low(known)
    return {rank: speed.microbatch_s if speed.is_known else median_s for rank, speed in speeds.items()}


def assign_shards(num_shards: int, speeds: Mapping[int, MeasuredSpeed], probe: int = -1) -> dict[int, Runs]:
    """The runs of each rank; `probe` gets one shard, whatever its speed."""
    return split_shards(num_shards, speeds, microbatch_seconds(speeds), single=probe)


def trainers_for_shards(job: Job, nodes: Mapping[str, NodeView]) -> list[Placement]:
    """The trainers that may have shards: those counted on; on draining nodes only if there are no others."""
    counted = list(counted_on(job.trainers))
    return [placement for placement in counted if not is_draining(nodes, placement.node_id)] or counted


def straggler_of(speeds: Mapping[int, MeasuredSpeed]) -> tuple[int, float]:
    """The slowest measured trainer's rank, and how many times the median one's time it takes; (-1, 1.0): none is."""
    known = {rank: speed.microbatch_s for rank, speed in speeds.items() if speed.is_known}
    if not known:
        return -1, 1.0
    slowest = max(sorted(known), key=lambda rank: known[rank])
    return slowest, known[slowest] / statistics.median_low(known.values())


def due(job: Job, placements: Sequence[Placement], processes: Processes, now: Instant) -> Move | None:
    """Whether shards should move between `placements`, the active trainers that may have some; None: as they lie."""
    assignment = job.assignment
    if assignment is None or len(placements) < 2 or job.stopping or job.finished is not None:
        return None
    speeds = measured_speeds(placements, job.job_id, processes)
    sizes = {placement.rank: sum(count for _, count in placement.shards) for placement in placements}
    if any(size and speeds[rank].measurements < MEASUREMENTS for rank, size in sizes.items()):
        return None
    probed = assignment.probe in speeds and speeds[assignment.probe].measured_at_s > assignment.since_s
    if not probed and not _rested(job, assignment, now):
        return None
    seconds = microbatch_seconds(speeds)
    before_s, after_s = makespan_s(sizes, seconds), least_makespan_s(job.num_shards, list(seconds.values()))
    gain = 1 - after_s / before_s if before_s else 0.0
    if gain > GAIN:
        return _move(job, placements, speeds, gain, _after_move(assignment, probed, now))
    return _probe(placements, speeds, sizes, after_s, assignment, now)


def _rested(job: Job, assignment: ShardAssignment, now: Instant) -> bool:
    return now.mono_s - assignment.since_s >= wait_s(assignment) and job.step - assignment.step >= STEPS


def wait_s(assignment: ShardAssignment) -> float:
    """How long shards stay where they are, at least."""
    return float(min(MAX_WAIT_S, WAIT_S * 2**assignment.moves))


def _after_move(assignment: ShardAssignment, probed: bool, now: Instant) -> ShardAssignment:
    """Moves that follow one another are waited for longer. The end of a probe is none: it has its own waits."""
    if probed:
        return replace(assignment, probe=-1)
    moves = 0 if now.mono_s - assignment.moved_s > QUIET * wait_s(assignment) else assignment.moves
    return replace(assignment, moves=min(moves + 1, 16), moved_s=now.mono_s, probe=-1)


def _move(
    job: Job,
    placements: Sequence[Placement],
    speeds: Mapping[int, MeasuredSpeed],
    gain: float,
    assignment: ShardAssignment,
) -> Move:
    slowest, ratio = straggler_of(speeds)
    runs = assign_shards(job.num_shards, speeds)
    sizes = {rank: sum(count for _, count in of_rank) for rank, of_rank in runs.items()}
    placement = next(placement for placement in placements if placement.rank == slowest)
    had, has = sum(count for _, count in placement.shards), sizes[slowest]
    if ratio >= NAMED:
        microbatch_s = speeds[slowest].microbatch_s
        what = f"{placement.name} on {placement.node_id} takes {ratio:.1f} times as long as the median trainer"
        what += f" for a microbatch ({microbatch_s:.3g} s): it has {has} of {job.num_shards} shards now, {had} before"
    else:
        what = f"no trainer is slow: they have {min(sizes.values())} to {max(sizes.values())} shards each now"
    tried = tuple((rank, count) for rank, count in assignment.tried if not sizes.get(rank))
    message = f"{what}; a step should take {gain:.0%} less"
    assignment = replace(assignment, tried=tried)
    return Move(reason="ShardsMoved", message=message, assignment=assignment, warning=ratio >= NAMED)


def _probe(
    placements: Sequence[Placement],
    speeds: Mapping[int, MeasuredSpeed],
    sizes: Mapping[int, int],
    least_s: float,
    assignment: ShardAssignment,
    now: Instant,
) -> Move | None:
    """Who was too slow to have shards may have become faster: the one that was measured longest ago is tried again."""
    tried = dict(assignment.tried)
    waiting = [
        placement
        for placement in placements
        if not sizes[placement.rank]
        and speeds[placement.rank].microbatch_s > least_s
        and now.mono_s - max(speeds[placement.rank].measured_at_s, assignment.since_s)
        >= probe_wait_s(tried.get(placement.rank, 0))
    ]
    if not waiting:
        return None
    placement = min(waiting, key=lambda placement: (speeds[placement.rank].measured_at_s, placement.rank))
    tried[placement.rank] = tried.get(placement.rank, 0) + 1
    message = f"{placement.name} on {placement.node_id} was too slow for a shard; it is tried again with one"
    probing = replace(assignment, probe=placement.rank, tried=tuple(sorted(tried.items())))
    return Move(reason="ShardTried", message=message, assignment=probing, probe=placement.rank)


def probe_wait_s(tried: int) -> float:
    """How long after its last measurement a trainer without shards is tried again, after so many tries in vain."""
    return delay_s(tried + 1, 0.0, first_s=PROBE_S, cap_s=MAX_PROBE_S, jitter=0.0)
