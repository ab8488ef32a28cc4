"""Placements, snapshot parts and plans: who runs what of a job, and what the plan of a generation contains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class ProcessKind(StrEnum):
    """What runs in a process."""

    TRAINER = "trainer"
    PARTITION = "partition"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A place in a job for one trainer or partition. Its process may be replaced; kind and rank stay.

    `node_id` is empty while no node has room. `incarnation` is the node's when it was assigned: in another one the
    process is gone. `attempt` counts the processes of this placement from 1; 0 before the first. `active`: it is
    ready. `suspect`: it is alive but makes no progress; shards go to others, if there are any, until it recovers.
    `shards` are (first, count) runs, trainers only; `addresses` are where a partition listens; `device` is where a
    trainer computes, and `numerics_class` of which class it is, once it is active. `losses`: processes lost here since
    the job last reached a new step; `failed_on`: the nodes where they were lost before they became ready, since one
    last did, oldest first.
    `not_before_s`: when the next one may start, on the master's monotonic clock; 0: at once. See `recovery`.
    `standby`: for the partition of this rank rather than being it; attempts are counted over both, so that the process
    that takes over keeps its id. `synced`: what the partition voted on is held here, so that a takeover by this process
    loses nothing, until either process is lost or the job is restored; true of every partition in the newest plan.
    """

    kind: ProcessKind
    rank: int
    attempt: int = 0
    node_id: str = ""
    incarnation: str = ""
    last_node_id: str = ""
    active: bool = False
    suspect: bool = False
    shards: tuple[tuple[int, int], ...] = ()
    addresses: tuple[str, ...] = ()
    device: str = ""
    numerics_class: str = ""
    losses: int = 0
    standby: bool = False
    synced: bool = False
    failed_on: tuple[str, ...] = ()
    not_before_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.rank}"

    @property
    def title(self) -> str:
        """The name for messages."""
        return f"the standby of {self.name}" if self.standby else self.name

    @property
    def num_shards(self) -> int:
        return sum(count for _, count in self.shards)

    @property
    def placed(self) -> bool:
        return bool(self.node_id)

    @property
    def held_back(self) -> bool:
        """Whether its process is not to start yet."""
        return self.not_before_s > 0.0

    def without_process(self, **fields: Any) -> Placement:
        """The same placement, vacant but for `fields`: what belonged to its process or node is reset."""
        vacant = Placement(kind=self.kind, rank=self.rank, attempt=self.attempt, standby=self.standby)
        kept = {name: getattr(self, name) for name in ("last_node_id", "losses", "failed_on", "not_before_s")}
        return replace(vacant, **(kept | fields))

    def process_id(self, job_id: str) -> str:
        """The id of the process that fills this placement now; unique for ever."""
        return f"{job_id}/{self.name}/{self.attempt}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One partition's file of one snapshot. `nodes`: who holds it; none: it lies in the store that all share."""

    step: int
    partition: int
    generation: int
    path: str
    size_bytes: int
    checksum: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RestorePoint:
    """A complete snapshot, its parts ordered by partition."""

    step: int
    parts: tuple[Part, ...]


def counted_on(trainers: Iterable[Placement]) -> tuple[Placement, ...]:
    """The trainers that get shards: the active ones, suspect ones only when there are no others."""
    active = [placement for placement in trainers if placement.active]
    return tuple(placement for placement in active if not placement.suspect) or tuple(active)


def process_keys(placements: Iterable[Placement]) -> frozenset[tuple[int, int]]:
    """(rank, attempt) of placements of one kind: it tells processes apart."""
    return frozenset((placement.rank, placement.attempt) for placement in placements)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The plan of one generation. `restore_generation` is the generation that ordered the newest restore,
    `moved_generation` the newest in which a standby took over, `coordinator_generation` the same for the coordinator;
    0: none."""

    generation: int
    trainers: tuple[Placement, ...]
    partitions: tuple[Placement, ...]
    restore_generation: int
    resume_step: int = 0
    restore: RestorePoint | None = None
    stop: bool = False
    save: bool = False
    kept_steps: tuple[int, ...] = ()
    final_step: int = 0
    standbys: tuple[Placement, ...] = ()
    moved_generation: int = 0
    coordinator_generation: int = 0

    def holds(self, placement: Placement) -> bool:
        """Whether the very process in `placement` is a partition in this plan."""
        return process_keys([placement]) <= process_keys(self.partitions)

    def names(self, placement: Placement) -> bool:
        """Whether this plan was made for the very process that fills `placement`."""
        placements = self.trainers if placement.kind is ProcessKind.TRAINER else self.partitions + self.standbys
        return process_keys([placement]) <= process_keys(placements)
