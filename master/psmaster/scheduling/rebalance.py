"""Rebalancing: when shards move from slow trainers to fast ones, by what the trainers measure. Pure.

Any trainer may compute any shard, so moving them changes no bit, but costs a new generation. So they move only for a
gain that is worth it, and less and less often when one move follows the other."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pscluster.wire.backoff import delay_s
from psmaster.model.job import Instant, Job, RebalanceState
from psmaster.model.membership import NodeView, is_draining
from psmaster.model.plan import Placement, counted_on
from psmaster.model.process import MeasuredSpeed, Processes

GAIN = 0.10  # of a step's time: what a move must promise
MEASUREMENTS = 2  # of each trainer that has shards, before anything is concluded
STEPS = 2  # committed since shards were last assigned
WAIT_S = 5.0  # since then; doubles with each move that comes soon after the one before
MAX_WAIT_S = 300.0
QUIET = 4  # so many waits without a move, and the next one is the first again
PROBE_S = 30.0  # after so long without a measurement who was too slow gets a shard again; doubles when in vain
MAX_PROBE_S = 600.0
NAMED = 1.15  # how much slower than the median a trainer is that the event names

Runs = tuple[tuple[int, int], ...]
"""Runs of shards as (first, count), rising."""

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Shards are to move. `warning`: a trainer is slow. `probe`: the rank that gets one shard to be measured, or -1."""

    reason: str
    message: str
    assignment: RebalanceState
    warning: bool = False
    probe: int = -1


def measured_speeds(placements: Iterable[Placement], job_id: str, processes: Processes) -> dict[int, MeasuredSpeed]:
    """What is known of the trainers in these placements, by rank."""
    found = {placement.rank: processes.get(placement.process_id(job_id)) for placement in placements}
    return {rank: process.speed if process else MeasuredSpeed() for rank, process in found.items()}


def microbatch_seconds(speeds: Mapping[int, MeasuredSpeed]) -> dict[int, float]:
    """Seconds a microbatch, by rank; for a trainer without measurements the median, or a second when none has any."""
    median_s = statistics.median_low([speed.microbatch_s for speed in speeds.values() if speed.is_known] or [1.0])
    return {rank: speed.microbatch_s if speed.is_known else median_s for rank, speed in speeds.items()}


def assign_shards(num_shards: int, speeds: Mapping[int, MeasuredSpeed], probe: int = -1) -> dict[int, Runs]:
    """The runs of each rank; `probe` gets one shard, whatever its speed."""
    return split_shards(num_shards, microbatch_seconds(speeds), single=probe)


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
    sizes = {placement.rank: placement.num_shards for placement in placements}
    if any(size and speeds[rank].measurements < MEASUREMENTS for rank, size in sizes.items()):
        return None
    probed = assignment.probe in speeds and speeds[assignment.probe].measured_at_s > assignment.since_s
    has_waited = now.mono_s - assignment.since_s >= wait_s(assignment) and job.step - assignment.step >= STEPS
    if not probed and not has_waited:
        return None
    seconds = microbatch_seconds(speeds)
    before_s, after_s = makespan_s(sizes, seconds), least_makespan_s(job.num_shards, list(seconds.values()))
    gain = 1 - after_s / before_s if before_s else 0.0
    if gain > GAIN:
        return _move(job, placements, speeds, gain, _after_move(assignment, probed, now))
    return _probe(placements, speeds, sizes, after_s, assignment, now)


def wait_s(assignment: RebalanceState) -> float:
    """How long shards stay where they are, at least."""
    return float(min(MAX_WAIT_S, WAIT_S * 2**assignment.moves))


def _after_move(assignment: RebalanceState, probed: bool, now: Instant) -> RebalanceState:
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
    assignment: RebalanceState,
) -> Move:
    slowest, ratio = straggler_of(speeds)
    runs = assign_shards(job.num_shards, speeds)
    sizes = {rank: sum(count for _, count in of_rank) for rank, of_rank in runs.items()}
    placement = next(placement for placement in placements if placement.rank == slowest)
    if ratio >= NAMED:
        microbatch_s = speeds[slowest].microbatch_s
        what = f"{placement.name} on {placement.node_id} takes {ratio:.1f} times as long as the median trainer"
        what += f" for a microbatch ({microbatch_s:.3g} s): it has {sizes[slowest]} of {job.num_shards} shards now"
        what += f", {placement.num_shards} before"
    else:
        what = f"no trainer is slow: they have {min(sizes.values())} to {max(sizes.values())} shards each now"
    tried = tuple((rank, count) for rank, count in assignment.tried if not sizes.get(rank))
    return Move(
        reason="ShardsMoved",
        message=f"{what}; a step should take {gain:.0%} less",
        assignment=replace(assignment, tried=tried),
        warning=ratio >= NAMED,
    )


def _probe(
    placements: Sequence[Placement],
    speeds: Mapping[int, MeasuredSpeed],
    sizes: Mapping[int, int],
    least_s: float,
    assignment: RebalanceState,
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
        >= delay_s(tried.get(placement.rank, 0) + 1, 0.0, first_s=PROBE_S, cap_s=MAX_PROBE_S, jitter=0.0)
    ]
    if not waiting:
        return None
    placement = min(waiting, key=lambda placement: (speeds[placement.rank].measured_at_s, placement.rank))
    tried[placement.rank] = tried.get(placement.rank, 0) + 1
    message = f"{placement.name} on {placement.node_id} was too slow for a shard; it is tried again with one"
    probing = replace(assignment, probe=placement.rank, tried=tuple(sorted(tried.items())))
    return Move(reason="ShardTried", message=message, assignment=probing, probe=placement.rank)


# ---- how many shards each trainer gets, and which: pure functions of their number and of the trainers' speeds ----


def split_shards(num_shards: int, speeds: Mapping[int, float], single: int = -1) -> dict[int, Runs]:
    """Give each rank one contiguous run of shards, so that the slowest is done as early as possible.

    `speeds`: seconds that a microbatch takes each rank, all positive. Who is too slow for even one shard gets none; so
    do surplus ranks where there are fewer shards. `single` gets just one, whatever its speed, if others can take the
    rest. Of the sizes near each one's fair part that take no longer, those are chosen whose runs consist of the fewest
    whole subtrees of the gradient tree, which is what crosses the wire. Ranks are served in rising order."""
    ordered = sorted(speeds)
    if not ordered:
        return {}
    alone = ordered.index(single) if single in ordered and len(ordered) > 1 and num_shards > 1 else -1
    sizes = _run_sizes(num_shards, tuple(speeds[rank] for rank in ordered), alone)
    runs: dict[int, Runs] = {}
    first = 0
    for rank, size in zip(ordered, sizes, strict=True):
        runs[rank] = ((first, size),) if size else ()
        first += size
    return runs


def makespan_s(sizes: Mapping[int, int], speeds: Mapping[int, float]) -> float:
    """When the last rank is done with its shards."""
    return max((size * speeds[rank] for rank, size in sizes.items()), default=0.0)


def least_makespan_s(num_shards: int, speeds: Sequence[float]) -> float:
    """The earliest that `num_shards` can be done."""
    sizes = _fastest(num_shards, tuple(speeds))
    return max((size * speed for size, speed in zip(sizes, speeds, strict=True)), default=0.0)


@lru_cache(maxsize=256)
def _fastest(num_shards: int, speeds: tuple[float, ...]) -> tuple[int, ...]:
    """Sizes that take the least time: each shard goes to who is done with it first, which is optimal."""
    done = sorted((speed, index) for index, speed in enumerate(speeds))
    sizes = [0] * len(speeds)
    for _ in range(num_shards if done else 0):
        index = done[0][1]
        sizes[index] += 1
        heapq.heapreplace(done, ((sizes[index] + 1) * speeds[index], index))
    return tuple(sizes)


@lru_cache(maxsize=256)
def _run_sizes(num_shards: int, speeds: tuple[float, ...], single: int) -> tuple[int, ...]:
    """Sizes of the runs in order; that of index `single` is 1 (-1: of none). Dynamic programme over (runs, shards
    assigned): the fewest subtrees."""
    if single >= 0:
        least, most = _bounds(num_shards - 1, speeds[:single] + speeds[single + 1 :])
        least.insert(single, 1)
        most.insert(single, 1)
    else:
        least, most = _bounds(num_shards, speeds)
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for index in range(len(speeds)):
        after: dict[int, tuple[int, tuple[int, ...]]] = {}
        must, may = num_shards - sum(most[index + 1 :]), num_shards - sum(least[index + 1 :])
        for first, (cost, sizes) in sorted(best.items(), reverse=True):
            for size in range(most[index], least[index] - 1, -1):
                assigned = first + size
                if not must <= assigned <= may:
                    continue
                option = (cost + cover_size(num_shards, first, size), (*sizes, size))
                if assigned not in after or option[0] < after[assigned][0]:
                    after[assigned] = option
        best = after
    return best[num_shards][1]


def _bounds(num_shards: int, speeds: tuple[float, ...]) -> tuple[list[int], list[int]]:
    """The least and the most that each rank may get: about its fair part, and no more than is done in the least time.

    The sum of the least is at most, that of the most at least, `num_shards`."""
    sizes = _fastest(num_shards, speeds)
    limit_s = max(size * speed for size, speed in zip(sizes, speeds, strict=True))
    fitting = [_fitting(limit_s, speed) for speed in speeds]
    total = sum(1 / speed for speed, high in zip(speeds, fitting, strict=True) if high)
    fair = [int(num_shards / speed / total + _ROUNDING) for speed in speeds]
    least = [*map(min, fair, fitting)]
    most = [min(high, max(low + 1, size)) for low, high, size in zip(least, fitting, sizes, strict=True)]
    return least, most


def _fitting(limit_s: float, speed: float) -> int:
    """How many microbatches of `speed` seconds fit into the limit, which is a multiple of one rank's."""
    count = int(limit_s / speed)
    while (count + 1) * speed <= limit_s:
        count += 1
    while count * speed > limit_s:
        count -= 1
    return count


@lru_cache(maxsize=65536)
def cover_size(num_leaves: int, first: int, count: int) -> int:
    """How many whole subtrees of the tree over `num_leaves` make up the leaves first ... first + count - 1."""
    if count <= 0:
        return 0
    if first <= 0 and count >= num_leaves - first:
        return 1
    left = 1 << ((num_leaves - 1).bit_length() - 1)
    in_left = max(0, min(first + count, left) - first)
    if in_left == 0:
        return cover_size(num_leaves - left, first - left, count)
    right_count = count - in_left
    return cover_size(left, first, in_left) + (cover_size(num_leaves - left, 0, right_count) if right_count else 0)
