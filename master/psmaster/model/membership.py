"""Membership: the nodes, their incarnations and their health. Pure; time is an argument.

A node is *ready* when its stream is open and a recent heartbeat arrived, *suspect* when it missed heartbeats or its
stream broke, *dead* after `suspicion_s` without one. A master that has just started counts from its own start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pscluster.devices import AUTO, CPU, fitting
from pscluster.errors import StateError
from psmaster.model.job import Instant, Job
from psmaster.model.plan import ProcessKind

FORMER = 16  # incarnations of a node that are remembered: they may still be running somewhere
FORGET_S = 3600.0  # a dead node without placements is removed after this long


class Role(StrEnum):
    WORKER = "worker"
    SERVER = "server"

    @classmethod
    def of(cls, kind: ProcessKind) -> Role:
        return cls.WORKER if kind is ProcessKind.TRAINER else cls.SERVER


class Health(StrEnum):
    READY = "ready"
    SUSPECT = "suspect"
    DEAD = "dead"


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node in one incarnation. `seen_s` is monotonic, `last_beat_s` a Unix time. `leaving`: it announced its end.
    `former`: the incarnations that it replaced, the latest last."""

    node_id: str
    role: Role
    incarnation: str
    former: tuple[str, ...] = ()
    slots: int = 0
    cpu_cores: int = 0
    memory_bytes: int = 0
    devices: tuple[str, ...] = ()
    version: str = ""
    hostname: str = ""
    metrics_address: str = ""
    depot_address: str = ""
    advertised_host: str = ""
    isolation: str = ""
    data_ports: str = ""
    connected: bool = False
    leaving: bool = False
    seen_s: float = 0.0
    last_beat_s: float = 0.0


Nodes = Mapping[str, Node]


def health(node: Node, now_s: float, suspicion_s: float) -> Health:
    silence = now_s - node.seen_s
    if silence > suspicion_s:
        return Health.DEAD
    if not node.connected or silence > suspicion_s / 2:
        return Health.SUSPECT
    return Health.READY


def register(nodes: Nodes, node: Node, now: Instant, suspicion_s: float) -> Nodes:
    """With `node` in its announced incarnation, which replaces the one before: clocks are not compared. Repeating it
    keeps the stream. Raises StateError for an incarnation that was replaced by one that is still alive."""
    held = nodes.get(node.node_id)
    if held and held.incarnation == node.incarnation:
        fresh = replace(node, connected=held.connected, former=held.former, seen_s=now.mono_s, last_beat_s=now.unix_s)
        return {**nodes, node.node_id: fresh}
    alive = held is not None and health(held, now.mono_s, suspicion_s) is not Health.DEAD
    if held and alive and node.incarnation in held.former:
        raise StateError(
            f"node {node.node_id} is held by a newer incarnation",
            action="stop the older daemon, or give one of them another --node-id",
        )
    former = (*held.former, held.incarnation)[-FORMER:] if held else ()
    new = replace(node, connected=False, former=former, seen_s=now.mono_s, last_beat_s=now.unix_s)
    return {**nodes, node.node_id: new}


def open_stream(nodes: Nodes, node_id: str, incarnation: str, now: Instant) -> Nodes:
    """With the node's stream open. Raises StateError for an incarnation that is not the registered one."""
    require_current(nodes, node_id, incarnation)
    return _with(nodes, node_id, incarnation, connected=True, seen_s=now.mono_s, last_beat_s=now.unix_s)


def beat(nodes: Nodes, node_id: str, incarnation: str, now: Instant) -> Nodes:
    """With the node's heartbeat at `now`. One of another incarnation changes nothing."""
    return _with(nodes, node_id, incarnation, seen_s=now.mono_s, last_beat_s=now.unix_s)


def detach(nodes: Nodes, node_id: str, incarnation: str) -> Nodes:
    """With the node's stream broken; its processes live on until suspicion runs out."""
    return _with(nodes, node_id, incarnation, connected=False)


def leave(nodes: Nodes, node_id: str, incarnation: str) -> Nodes:
    """Without a node that ended in its present incarnation. Safe to repeat."""
    return {k: node for k, node in nodes.items() if (k, node.incarnation) != (node_id, incarnation)}


def announce_leave(nodes: Nodes, node_id: str, incarnation: str) -> Nodes:
    """With a node that is about to end, so that its processes move elsewhere. Safe to repeat."""
    return _with(nodes, node_id, incarnation, leaving=True)


def is_current(nodes: Nodes, node_id: str, incarnation: str) -> bool:
    """Whether the node is registered in that incarnation."""
    return node_id in nodes and nodes[node_id].incarnation == incarnation


def require_current(nodes: Nodes, node_id: str, incarnation: str) -> None:
    """Raises StateError unless the node is registered in that incarnation."""
    if not is_current(nodes, node_id, incarnation):
        raise StateError(f"node {node_id} is not registered in this incarnation", action="register first")


def _with(nodes: Nodes, node_id: str, incarnation: str, **fields: Any) -> Nodes:
    """With `fields` of a node changed; another incarnation's message changes nothing."""
    if not is_current(nodes, node_id, incarnation):
        return nodes
    return {**nodes, node_id: replace(nodes[node_id], **fields)}


def forget(nodes: Nodes, now: Instant) -> Nodes:
    """Without the nodes that have been silent for an hour, so that their number stays bounded."""
    kept = {node_id: node for node_id, node in nodes.items() if now.mono_s - node.seen_s <= FORGET_S}
    return nodes if len(kept) == len(nodes) else kept


def shift_last_seen(nodes: Nodes, seconds: float) -> Nodes:
    """With the time of every node's last heartbeat moved forward by `seconds`."""
    return {node_id: replace(node, seen_s=node.seen_s + seconds) for node_id, node in nodes.items()}


def presumed(jobs: Mapping[str, Job], now: Instant) -> Nodes:
    """The nodes that a restarted master assumes because its jobs have placements there: not connected, not yet dead."""
    nodes: dict[str, Node] = {}
    for job in jobs.values():
        for own in job.placements:
            if own.placed and own.node_id not in nodes:
                role = Role.of(own.kind)
                node = Node(node_id=own.node_id, role=role, incarnation=own.incarnation, seen_s=now.mono_s)
                nodes[own.node_id] = node
    return nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeView:
    """A node as scheduling sees it. `available`: its slots that no other job holds; `held`: those of its CUDA `devices`
    that other jobs hold; `undecided`: how many trainers of other jobs start there and may take any of the rest.
    `alive`: its processes count as living. `ready`: it may be given new ones. `draining`: those it has are to go."""

    node_id: str
    role: Role
    incarnation: str
    alive: bool
    ready: bool
    slots: int
    available: int
    draining: bool = False
    devices: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()
    undecided: int = 0

    def free_slots(self, device: str, *, of_all: bool = False) -> int:
        """How many processes of one job fit, each on a device of its own where `device` is a CUDA device. `of_all`: if
        no other job held anything."""
        slots = max(0, self.slots if of_all else self.available)
        if device in (AUTO, CPU):
            return slots
        fit = fitting(device, self.devices)
        free = len(fit) if of_all else sum(1 for name in fit if name not in self.held) - self.undecided
        return min(slots, max(0, free))


def is_draining(views: Mapping[str, NodeView], node_id: str) -> bool:
    """Whether what runs on a node is to move away."""
    return node_id in views and views[node_id].draining
