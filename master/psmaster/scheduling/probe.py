"""What a probe measures, in which order: rounds whose measurements do not disturb each other. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from typing import TypeVar

from psmaster.model.membership import Health, Node, Nodes, Role, health
from psmaster.model.probe import ProbeExtent

T = TypeVar("T")

PAIR_S = 3.0
"""What a pair takes: a second each way, half of one for small messages, and what it takes to connect."""
COMPUTE_S = 15.0
"""What a device takes, most of it to load torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePair:
    """`dialer` connects to `listener`, a server: workers accept no connections."""

    dialer: Node
    listener: Node

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset({host_of(self.dialer), host_of(self.listener)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSchedule:
    """Rounds, one after the other; what is in one round may run at once. `left_out`: nodes that are not ready."""

    pairs: tuple[tuple[NodePair, ...], ...]
    workers: tuple[tuple[Node, ...], ...]
    left_out: tuple[str, ...]

    @property
    def extent(self) -> ProbeExtent:
        num_devices = sum(max(len(worker.devices) or 1 for worker in workers) for workers in self.workers)
        return ProbeExtent(
            num_pairs=sum(map(len, self.pairs)),
            num_nodes=sum(map(len, self.workers)),
            expected_s=len(self.pairs) * PAIR_S + num_devices * COMPUTE_S,
            left_out=self.left_out,
        )


def schedule(nodes: Nodes, now_s: float, suspicion_s: float) -> ProbeSchedule:
    """Every pair that jobs may connect, each once: worker and server, and two servers; and every worker's devices. No
    host takes part in two measurements of a round."""
    known = sorted(nodes.values(), key=lambda node: node.node_id)
    ready = [node for node in known if health(node, now_s, suspicion_s) is Health.READY]
    workers = [node for node in ready if node.role is Role.WORKER]
    servers = [node for node in ready if node.role is Role.SERVER]
    ends = [*product(workers, servers), *combinations(servers, 2)]
    pairs = [NodePair(dialer=dialer, listener=listener) for dialer, listener in ends]
    return ProbeSchedule(
        pairs=rounds(pairs, lambda pair: pair.hosts),
        workers=rounds(workers, lambda worker: {host_of(worker)}),
        left_out=tuple(node.node_id for node in known if node not in ready),
    )


def rounds(items: Iterable[T], needs: Callable[[T], Iterable[Hashable]]) -> tuple[tuple[T, ...], ...]:
    """Each item in the first round where nobody needs what it needs. Fewer than twice as many rounds as the items that
    need any one thing."""
    chosen: list[list[T]] = []
    used: list[set[Hashable]] = []
    for item in items:
        needed = set(needs(item))
        number = next((number for number, others in enumerate(used) if not others & needed), len(used))
        if number == len(used):
            chosen.append([])
            used.append(set())
        chosen[number].append(item)
        used[number] |= needed
    return tuple(map(tuple, chosen))


def host_of(node: Node) -> str:
    """What two nodes of one machine have in common, and of two machines never: behind NAT addresses repeat, and so do
    names where nobody gave any."""
    return f"{node.hostname or node.node_id} {node.advertised_host}"
