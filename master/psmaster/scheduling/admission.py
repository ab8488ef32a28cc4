"""Admission and the choice of nodes: pure functions with their reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pscluster.devices import AUTO, CPU, CUDA
from pscluster.job.spec import JobSpec
from psmaster.model.job import Job
from psmaster.model.membership import NodeView, Role
from psmaster.model.plan import ProcessKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The node id of each trainer and partition of a job; empty when it must wait, for `reason`. `possible`: the ready
    nodes could hold the job if no other job held slots."""

    trainers: tuple[str, ...] = ()
    partitions: tuple[str, ...] = ()
    reason: str = ""
    possible: bool = True


def admit(spec: JobSpec, nodes: Mapping[str, NodeView]) -> Admission:
    """Placements for all of a job or for nothing of it: between workers.min and workers.max trainers, all its
    partitions."""
    device = spec.workers.device
    trainers = _rooms(nodes, Role.WORKER, device)
    partitions = _rooms(nodes, Role.SERVER, CPU)
    missing = _shortages(spec, trainers, partitions)
    if missing:
        of_all = _rooms(nodes, Role.WORKER, device, of_all=True), _rooms(nodes, Role.SERVER, CPU, of_all=True)
        never = _shortages(spec, *of_all)
        return Admission(reason=_waits(missing, never), possible=not never)
    num_trainers = min(max_trainers(spec), sum(trainers.values()))
    return Admission(trainers=_spread(trainers, num_trainers), partitions=_spread(partitions, spec.servers.partitions))


def max_trainers(spec: JobSpec) -> int:
    """The most trainers that a job can use: more than its shards would never have work."""
    limit = spec.train.num_shards
    return limit if spec.workers.max is None else min(limit, spec.workers.max)


def choose_node(
    job: Job,
    nodes: Mapping[str, NodeView],
    kind: ProcessKind,
    excluded: frozenset[str],
    preferred: str = "",
    planned: Sequence[str] = (),
) -> NodeView | None:
    """A ready node with room for one more process of a job: `preferred` if it has some, else the emptiest, then the
    first by id. `planned`: the nodes of processes that are to be placed before."""
    role, device = Role.of(kind), job.spec.workers.device if kind is ProcessKind.TRAINER else CPU
    taken = Counter([*(own.node_id for own in job.placements if own.placed), *planned])
    free = {
        node.node_id: node.free_slots(device) - taken[node.node_id]
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
        node.node_id: node.free_slots(device, of_all=of_all)
        for node in sorted(nodes.values(), key=lambda node: _natural(node.node_id))
        if node.role is role and node.ready
    }


def _natural(node_id: str) -> tuple[str, int, str]:
    """Worker-2 before worker-10."""
    stem = node_id.rstrip("0123456789")
    number = node_id[len(stem) :]
    return stem, int(number or 0), node_id


def _shortages(spec: JobSpec, trainers: Mapping[str, int], partitions: Mapping[str, int]) -> list[str]:
    """What is missing of a job's placements, and how much of it there is: "2 workers: 1"."""
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
    what = "ready" if never else "free, other jobs hold the rest"
    return "waits for " + " and ".join(f"{shortage} {what}" for shortage in never or missing)


def _spread(slots: Mapping[str, int], count: int) -> tuple[str, ...]:
    """One on each node in turn."""
    left = dict(slots)
    places: list[str] = []
    while len(places) < count:
        turn = [node_id for node_id, free in left.items() if free > 0]
        left = {node_id: left[node_id] - 1 for node_id in turn}
        places += turn
    return tuple(places[:count])
