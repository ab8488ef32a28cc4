"""Membership: which nodes there are, in which life, and whether they are well. Pure; time is an argument.

A node is *ready* when its stream is open and it spoke lately, *suspect* when it has missed beats or its stream broke,
*dead* after `suspicion_s` of silence. A master that has just started counts the silence from its own start, so that
nobody is evicted for what happened while it was away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from pscluster.errors import StateError
from psmaster.model.job import Instant, Job
from psmaster.model.plan import ProcessKind

FORMER = 16  # lives of a node that are remembered: what may still be running somewhere
FORGET_S = 3600.0  # a dead node that holds no placement is forgotten after this long


class Role(StrEnum):
    WORKER = "worker"
    SERVER = "server"

    @classmethod
    def of(cls, kind: ProcessKind) -> Role:
        """The role of the nodes that run processes of `kind`."""
        return cls.WORKER if kind is ProcessKind.TRAINER else cls.SERVER


class Health(StrEnum):
    READY = "ready"
    SUSPECT = "suspect"
    DEAD = "dead"


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node in one life. `seen_s` is monotonic, `last_beat_s` a Unix time. `leaving`: it said that it is about to
    end. `former`: incarnations whose place it took, the latest last."""

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
    attended: bool = False
    leaving: bool = False
    seen_s: float = 0.0
    last_beat_s: float = 0.0


Nodes = Mapping[str, Node]


def health(node: Node, now_s: float, suspicion_s: float) -> Health:
    """How a node is at monotonic time `now_s`."""
    silence = now_s - node.seen_s
    if silence > suspicion_s:
        return Health.DEAD
    if not node.attended or silence > suspicion_s / 2:
        return Health.SUSPECT
    return Health.READY


def register(nodes: Nodes, node: Node, now: Instant, suspicion_s: float) -> Nodes:
    """With `node` in its announced life. Repeating it keeps the stream. The newer of two lives, the one that was heard
    of later, takes the place of the older. (Clocks of two machines, or of one that was set, do not tell.)

    Raises StateError for a life that was displaced by one that still lives: it is a leftover.
    """
    held = nodes.get(node.node_id)
    if held and held.incarnation == node.incarnation:
        fresh = replace(node, attended=held.attended, former=held.former, seen_s=now.mono_s, last_beat_s=now.unix_s)
        return {**nodes, node.node_id: fresh}
    alive = held is not None and health(held, now.mono_s, suspicion_s) is not Health.DEAD
    if held and alive and node.incarnation in held.former:
        raise StateError(
            f"node {node.node_id} is held by a newer incarnation",
            action="stop the older daemon, or give one of them another --node-id",
        )
    former = (*held.former, held.incarnation)[-FORMER:] if held else ()
    new = replace(node, attended=False, former=former, seen_s=now.mono_s, last_beat_s=now.unix_s)
    return {**nodes, node.node_id: new}


def attend(nodes: Nodes, node_id: str, incarnation: str, now: Instant) -> Nodes:
    """With the node's stream open. Raises StateError for a life that is not the registered one."""
    held = _current(nodes, node_id, incarnation)
    return {**nodes, node_id: replace(held, attended=True, seen_s=now.mono_s, last_beat_s=now.unix_s)}


def beat(nodes: Nodes, node_id: str, incarnation: str, now: Instant) -> Nodes:
    """With the node heard of now. A beat of another life changes nothing."""
    held = nodes.get(node_id)
    if held is None or held.incarnation != incarnation:
        return nodes
    return {**nodes, node_id: replace(held, seen_s=now.mono_s, last_beat_s=now.unix_s)}


def detach(nodes: Nodes, node_id: str, incarnation: str) -> Nodes:
    """With the node's stream broken; its processes live on until suspicion runs out."""
    held = nodes.get(node_id)
    if held is None or held.incarnation != incarnation:
        return nodes
    return {**nodes, node_id: replace(held, attended=False)}


def leave(nodes: Nodes, node_id: str, incarnation: str) -> Nodes:
    """Without a node that said goodbye in its present life: it is missed by nobody. Safe to repeat."""
    held = nodes.get(node_id)
    if held is None or held.incarnation != incarnation:
        return nodes
    return {other_id: node for other_id, node in nodes.items() if other_id != node_id}


def announce_leave(nodes: Nodes, node_id: str, incarnation: str) -> Nodes:
    """With a node that is about to end: what it runs should go on elsewhere. Safe to repeat."""
    held = nodes.get(node_id)
    if held is None or held.incarnation != incarnation:
        return nodes
    return {**nodes, node_id: replace(held, leaving=True)}


def forget(nodes: Nodes, now: Instant) -> Nodes:
    """Without the nodes that have been silent for an hour: what is remembered stays bounded."""
    kept = {node_id: node for node_id, node in nodes.items() if now.mono_s - node.seen_s <= FORGET_S}
    return nodes if len(kept) == len(nodes) else kept


def excuse(nodes: Nodes, seconds: float) -> Nodes:
    """With so much silence of every node forgiven."""
    return {node_id: replace(node, seen_s=node.seen_s + seconds) for node_id, node in nodes.items()}


def presumed(jobs: Mapping[str, Job], now: Instant) -> Nodes:
    """The nodes that a restarted master believes in because its jobs have placements there: unheard of, but not yet
    dead."""
    nodes: dict[str, Node] = {}
    for job in jobs.values():
        for placement in job.placements:
            if placement.placed and placement.node_id not in nodes:
                nodes[placement.node_id] = Node(
                    node_id=placement.node_id,
                    role=Role.of(placement.kind),
                    incarnation=placement.incarnation,
                    seen_s=now.mono_s,
                )
    return nodes


def _current(nodes: Nodes, node_id: str, incarnation: str) -> Node:
    held = nodes.get(node_id)
    if held is None or held.incarnation != incarnation:
        raise StateError(f"node {node_id} is not registered in this incarnation", action="register first")
    return held
