"""Admission, seating, shard dealing and the choice of numerics: pure functions with their reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pscluster.spec import JobSpec
from psmaster.registry import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeView:
    """A node as planning sees it. `available`: its slots that no other job holds.

    `alive`: its processes count as living. `ready`: it may be given new ones.
    """

    node_id: str
    role: Role
    incarnation: str
    alive: bool
    ready: bool
    slots: int
    available: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """Where a job's processes go: one node id for each trainer and partition. Empty when it must wait: `reason` says
    for what. `possible`: the ready nodes could hold the job if no other job held slots."""

    trainers: tuple[str, ...] = ()
    partitions: tuple[str, ...] = ()
    reason: str = ""
    possible: bool = True

    @property
    def admitted(self) -> bool:
        return bool(self.trainers)


def admit(spec: JobSpec, nodes: Mapping[str, NodeView]) -> Admission:
    """Seats for all of a job or for nothing of it: between workers.min and workers.max trainers, all its partitions."""
    worker_slots = _slots(nodes, Role.WORKER)
    server_slots = _slots(nodes, Role.SERVER)
    reasons = [
        _shortage("worker", spec.workers.min, worker_slots),
        _shortage("server", spec.servers.partitions, server_slots),
    ]
    if any(reasons):
        total = _slots(nodes, Role.WORKER, of_all=True), _slots(nodes, Role.SERVER, of_all=True)
        possible = sum(total[0].values()) >= spec.workers.min and sum(total[1].values()) >= spec.servers.partitions
        return Admission(reason=_waits(spec, reasons, total, possible), possible=possible)
    num_trainers = min(max_trainers(spec), sum(worker_slots.values()))
    return Admission(
        trainers=_spread(worker_slots, num_trainers),
        partitions=_spread(server_slots, spec.servers.partitions),
    )


def max_trainers(spec: JobSpec) -> int:
    """The most trainers that a job can use: more than its shards would never have work."""
    limit = spec.train.num_shards
    return limit if spec.workers.max is None else min(limit, spec.workers.max)


def choose_node(
    nodes: Mapping[str, NodeView], role: Role, taken: Mapping[str, int], excluded: frozenset[str], preferred: str = ""
) -> NodeView | None:
    """A ready node with a free slot: `preferred` if it has one, else the emptiest, then the first by id.

    `taken` counts the slots that the job itself holds on each node."""
    free = {
        node.node_id: node.available - taken.get(node.node_id, 0)
        for node in nodes.values()
        if node.role is role and node.ready and node.node_id not in excluded
    }
    if free.get(preferred, 0) > 0:
        return nodes[preferred]
    best = max(sorted(free), key=lambda node_id: free[node_id], default=None)
    return nodes[best] if best is not None and free[best] > 0 else None


def _slots(nodes: Mapping[str, NodeView], role: Role, of_all: bool = False) -> dict[str, int]:
    return {
        node.node_id: max(0, node.slots if of_all else node.available)
        for node in sorted(nodes.values(), key=lambda node: _natural(node.node_id))
        if node.role is role and node.ready
    }


def _natural(node_id: str) -> tuple[str, int, str]:
    """Sorts worker-2 before worker-10."""
    stem = node_id.rstrip("0123456789")
    number = node_id[len(stem) :]
    return stem, int(number or 0), node_id


def _shortage(what: str, wanted: int, slots: Mapping[str, int]) -> str:
    have = sum(slots.values())
    return "" if have >= wanted else f"{wanted} {what}{'s' if wanted > 1 else ''}: {have}"


def _waits(spec: JobSpec, reasons: Sequence[str], total: tuple[dict[str, int], dict[str, int]], possible: bool) -> str:
    if possible:
        return "waits for " + " and ".join(f"{reason} free, other jobs hold the rest" for reason in reasons if reason)
    wanted = (("worker", spec.workers.min), ("server", spec.servers.partitions))
    missing = [_shortage(what, count, slots) for (what, count), slots in zip(wanted, total, strict=True)]
    return "waits for " + " and ".join(f"{reason} ready" for reason in missing if reason)


def _spread(slots: Mapping[str, int], count: int) -> tuple[str, ...]:
    """`count` places dealt one to each node in turn."""
    left = dict(slots)
    places: list[str] = []
    while len(places) < count:
        for node_id in [node_id for node_id, free in left.items() if free > 0]:
            left[node_id] -= 1
            places.append(node_id)
            if len(places) == count:
                break
    return tuple(places)


Runs = tuple[tuple[int, int], ...]
"""Runs of shards as (first, count), rising."""


def deal_shards(num_shards: int, ranks: Iterable[int]) -> dict[int, Runs]:
    """Give each rank one contiguous run of shards, sizes as equal as possible.

    Which ranks get the larger runs is free; it is chosen so that the runs consist of as few whole subtrees of the
    left-balanced gradient tree as possible, which is what crosses the wire. With more ranks than shards the surplus
    ranks get no run. Ranks are served in rising order; the result depends on nothing else.
    """
    ordered = sorted(ranks)
    if not ordered:
        return {}
    sizes = _run_sizes(num_shards, len(ordered))
    runs: dict[int, Runs] = {}
    first = 0
    for rank, size in zip(ordered, sizes, strict=True):
        runs[rank] = ((first, size),) if size else ()
        first += size
    return runs


@lru_cache(maxsize=256)
def _run_sizes(num_shards: int, num_ranks: int) -> tuple[int, ...]:
    """Sizes of the runs in order. Dynamic programme over (runs dealt, how many of them were large)."""
    small, num_large = divmod(num_shards, num_ranks)
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for dealt in range(num_ranks):
        after: dict[int, tuple[int, tuple[int, ...]]] = {}
        for large, (cost, sizes) in sorted(best.items(), reverse=True):
            first = dealt * small + large
            for extra in (1, 0):
                size = small + extra
                total = large + extra
                if total > num_large or num_large - total > num_ranks - dealt - 1:
                    continue
                option = (cost + cover_size(num_shards, first, size), (*sizes, size))
                if total not in after or option[0] < after[total][0]:
                    after[total] = option
        best = after
    return best[num_large][1]


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
