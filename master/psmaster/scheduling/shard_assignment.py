"""How many shards each trainer gets, and which: pure functions of their number and of the trainers' speeds."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

Runs = tuple[tuple[int, int], ...]
"""Runs of shards as (first, count), rising."""

_ROUNDING = 1e-9


def split_shards(
    num_shards: int, ranks: Iterable[int], speeds: Mapping[int, float] | None = None, single: int | None = None
) -> dict[int, Runs]:
    """Give each rank one contiguous run of shards, so that the slowest is done as early as possible.

    `speeds`: seconds that a microbatch takes each rank, all positive; without them all are equal, and so are the sizes,
    as far as they can be. Who is too slow for even one shard gets none; so do the surplus ranks where there are more
    of them than shards. `single` gets just one, whatever its speed, if others can take the rest. Of the sizes near each
    one's fair part that take no longer, those are chosen whose runs consist of the fewest whole subtrees of the
    left-balanced gradient tree, which is what crosses the wire. Ranks are served in rising order; the result depends on
    nothing else.
    """
    ordered = sorted(ranks)
    if not ordered:
        return {}
    alone = ordered.index(single) if single in ordered and len(ordered) > 1 and num_shards > 1 else -1
    sizes = _run_sizes(num_shards, tuple((speeds or {}).get(rank, 1.0) for rank in ordered), alone)
    runs: dict[int, Runs] = {}
    first = 0
    for rank, size in zip(ordered, sizes, strict=True):
        runs[rank] = ((first, size),) if size else ()
        first += size
    return runs


def makespan_s(sizes: Mapping[int, int], speeds: Mapping[int, float]) -> float:
    """When the last rank is done with its shards; waiting for each other left out."""
    return max((size * speeds[rank] for rank, size in sizes.items()), default=0.0)


def least_makespan_s(num_shards: int, speeds: Sequence[float]) -> float:
    """The earliest that `num_shards` can be done."""
    sizes = _fastest(num_shards, tuple(speeds))
    return max((size * speed for size, speed in zip(sizes, speeds, strict=True)), default=0.0)


@lru_cache(maxsize=256)
def _fastest(num_shards: int, speeds: tuple[float, ...]) -> tuple[int, ...]:
    """Sizes that take the least time: each shard goes to who is done with it first, which is optimal."""
    done = [(speed, index) for index, speed in enumerate(speeds)]
    heapq.heapify(done)
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
    least = [
        min(int(num_shards / speed / total + _ROUNDING), high) for speed, high in zip(speeds, fitting, strict=True)
    ]
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
