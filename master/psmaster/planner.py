"""Admission, seating, shard dealing and the choice of numerics: pure functions with their reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pscluster.devices import AUTO, CPU, CUDA, fitting
from pscluster.spec import JobSpec
from psmaster.registry import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeView:
    """A node as planning sees it. `available`: its slots that no other job holds; `held`: those of its CUDA `devices`
    that other jobs hold; `undecided`: how many trainers of other jobs start there and may take any of the rest.

    `alive`: its processes count as living. `ready`: it may be given new ones.
    """

    node_id: str
    role: Role
    incarnation: str
    alive: bool
    ready: bool
    slots: int
    available: int
    devices: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()
    undecided: int = 0

    def room(self, device: str, *, of_all: bool = False) -> int:
        """How many processes of one job fit, each on a device of its own where `device` is a CUDA device. `of_all`: if
        no other job held anything."""
        slots = max(0, self.slots if of_all else self.available)
        if device in (AUTO, CPU):
            return slots
        fit = fitting(device, self.devices)
        free = len(fit) if of_all else sum(1 for name in fit if name not in self.held) - self.undecided
        return min(slots, max(0, free))


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
    device = spec.workers.device
    trainers = _rooms(nodes, Role.WORKER, device)
    partitions = _rooms(nodes, Role.SERVER, CPU)
    missing = _shortages(spec, trainers, partitions)
    if missing:
        of_all = _rooms(nodes, Role.WORKER, device, of_all=True), _rooms(nodes, Role.SERVER, CPU, of_all=True)
        never = _shortages(spec, *of_all)
        return Admission(reason=_waits(missing, never), possible=not never)
    num_trainers = min(max_trainers(spec), sum(trainers.values()))
    return Admission(
        trainers=_spread(trainers, num_trainers),
        partitions=_spread(partitions, spec.servers.partitions),
    )


def max_trainers(spec: JobSpec) -> int:
    """The most trainers that a job can use: more than its shards would never have work."""
    limit = spec.train.num_shards
    return limit if spec.workers.max is None else min(limit, spec.workers.max)


def choose_node(
    nodes: Mapping[str, NodeView],
    role: Role,
    taken: Mapping[str, int],
    excluded: frozenset[str],
    preferred: str = "",
    device: str = CPU,
) -> NodeView | None:
    """A ready node with room for a process on `device`: `preferred` if it has some, else the emptiest, then the first
    by id.

    `taken` counts the slots that the job itself holds on each node."""
    free = {
        node.node_id: node.room(device) - taken.get(node.node_id, 0)
        for node in nodes.values()
        if node.role is role and node.ready and node.node_id not in excluded
    }
    if free.get(preferred, 0) > 0:
        return nodes[preferred]
    best = max(sorted(free), key=lambda node_id: free[node_id], default=None)
    return nodes[best] if best is not None and free[best] > 0 else None


def with_device(device: str) -> str:
    """What a worker must have for a job that wants `device`, as words after "worker"; empty: nothing."""
    if device in (AUTO, CPU):
        return ""
    return " with a CUDA device" if device == CUDA else f" with the device {device}"


def _rooms(nodes: Mapping[str, NodeView], role: Role, device: str, of_all: bool = False) -> dict[str, int]:
    return {
        node.node_id: node.room(device, of_all=of_all)
        for node in sorted(nodes.values(), key=lambda node: _natural(node.node_id))
        if node.role is role and node.ready
    }


def _natural(node_id: str) -> tuple[str, int, str]:
    """Sorts worker-2 before worker-10."""
    stem = node_id.rstrip("0123456789")
    number = node_id[len(stem) :]
    return stem, int(number or 0), node_id


def _shortages(spec: JobSpec, trainers: Mapping[str, int], partitions: Mapping[str, int]) -> list[str]:
    """What is missing of a job's seats, and how much of it there is: "2 workers: 1"."""
    wanted = (
        (spec.workers.min, "worker", with_device(spec.workers.device), trainers),
        (spec.servers.partitions, "server", "", partitions),
    )
    return [
        f"{count} {what}{'s' if count > 1 else ''}{having}: {sum(rooms.values())}"
        for count, what, having, rooms in wanted
        if sum(rooms.values()) < count
    ]


def _waits(missing: Sequence[str], never: Sequence[str]) -> str:
    """`never`: what would be missing if no other job held anything."""
    if never:
        return "waits for " + " and ".join(f"{shortage} ready" for shortage in never)
    return "waits for " + " and ".join(f"{shortage} free, other jobs hold the rest" for shortage in missing)


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
