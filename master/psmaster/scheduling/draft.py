"""The working copy of one job during reconciliation, and the inputs of a reconciliation.

A `Draft` covers one job; `control.transaction.Transaction` covers the whole state of the master."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from psmaster.model.job import ErrorInfo, Event, Instant, Job, JobState, end_job, fail_job
from psmaster.model.membership import NodeView
from psmaster.model.plan import Placement, ProcessKind
from psmaster.model.process import Processes
from psmaster.model.snapshot_catalog import Catalogue


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long reconciliation waits, and how many losses it tolerates. Durations are on the monotonic clock."""

    suspicion_s: float = 3.0  # silence after which a node is dead
    trainer_grace_s: float = 30.0  # how long a suspect trainer may live before it is replaced
    first_grace_s: float = 600.0  # the same while it is at its first microbatch: compilers and cold devices
    max_losses: int = 5  # processes one placement may lose without a new step in between
    gather_s: float = 5.0  # how long other nodes' failures at start are waited for
    finish_grace_s: float = 600.0  # how long a job that was asked to stop waits for its last snapshot to be complete
    stop_grace_s: float = 300.0  # how long a stopping job may take to reach a step boundary
    stop_idle_grace_s: float = 15.0  # the same when no trainer is there to reach one


@dataclass(frozen=True, kw_only=True)
class View:
    """The read-only inputs of a reconciliation."""

    nodes: Mapping[str, NodeView]
    processes: Processes
    now: Instant
    limits: Limits
    grow: bool


@dataclass
class Draft:
    """A mutable copy of one job and its catalogue, which `reconcile` changes and returns; the values in it are
    immutable. `cut_to`: metrics after this step are void; None: none are."""

    job: Job
    snapshots: Catalogue
    now: Instant
    events: list[Event] = field(default_factory=list)
    cut_to: int | None = None

    def update(self, **fields: Any) -> None:
        """Set fields of the job. Skip no-op updates: most transactions change no field, and a copy of a job is slow."""
        if any(getattr(self.job, name) != value for name, value in fields.items()):
            self.job = replace(self.job, **fields)

    def emit(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Append an event."""
        self.events.append(Event(time_s=self.now.unix_s, reason=reason, message=message, warning=warning))

    def end(self, state: JobState, reason: str, *, warning: bool = False) -> None:
        self.job, event = end_job(self.job, state, reason, self.now, warning=warning)
        self.events.append(event)

    def fail(self, error: ErrorInfo, traceback: str = "") -> None:
        self.job, event = fail_job(self.job, error, self.now, traceback)
        self.events.append(event)

    def set_placement(self, placement: Placement) -> None:
        """Replace the placement of the same kind and rank, or append a new one."""
        field = (
            "trainers" if placement.kind is ProcessKind.TRAINER else "standbys" if placement.standby else "partitions"
        )
        placements = {own.rank: own for own in getattr(self.job, field)} | {placement.rank: placement}
        self.update(**{field: tuple(placements[rank] for rank in sorted(placements))})

    def assign_node(self, held: Placement, node: NodeView) -> None:
        """Give a placement a node and its next attempt, so that the process id is new."""
        attempts = dict(self.job.attempts)
        attempt = attempts[held.name] = attempts.get(held.name, 0) + 1
        self.update(attempts=tuple(sorted(attempts.items())))
        self.set_placement(held.without_process(attempt=attempt, node_id=node.node_id, incarnation=node.incarnation))

    def add_trainer(self, node: NodeView, why: str) -> None:
        """Start one more trainer on a node."""
        rank = max((own.rank for own in self.job.trainers), default=-1) + 1
        placement = Placement(kind=ProcessKind.TRAINER, rank=rank)
        self.assign_node(placement, node)
        self.emit("TrainerAdded", f"{placement.name} starts on {node.node_id}, {why}")

    def vacate(self, placement: Placement, *, losses: int | None = None) -> None:
        """Take a placement's node away; its process, if alive, is ended."""
        losses = placement.losses if losses is None else losses
        self.set_placement(placement.without_process(last_node_id=placement.node_id, losses=losses))

    def take_over(self, lost: Placement, losses: int) -> None:
        """Give a lost partition's placement to its standby, if it has one. In sync, the standby continues; otherwise it
        restores, which still saves the start of a process."""
        standby = self.job.standby(lost.rank)
        if standby is None or not standby.placed:
            return
        self.set_placement(replace(standby, standby=False, losses=losses))
        vacant = Placement(kind=ProcessKind.PARTITION, rank=lost.rank, standby=True, last_node_id=lost.node_id)
        self.set_placement(vacant)
        if standby.synced:
            self.emit("TookOver", f"the standby on {standby.node_id} takes over as {lost.name}; no step is repeated")
        else:
            self.emit("Placed", f"{lost.name} goes to {standby.node_id}, whose standby was not in sync")

    def remove_trainer(self, placement: Placement) -> None:
        """Remove a trainer's placement; its process, if alive, is ended and not replaced."""
        self.update(
            trainers=tuple(own for own in self.job.trainers if own.rank != placement.rank),
            connections=tuple(held for held in self.job.connections if held.trainer != placement.rank),
        )

    def exclude(self, node_id: str, incarnation: str, why: str) -> None:
        """Exclude a node from this job for the rest of its incarnation."""
        others = tuple(entry for entry in self.job.excluded if entry[0] != node_id)
        self.update(excluded=(*others, (node_id, incarnation, why)))
        self.emit("NodeLeftOut", f"{node_id} is left out: {why}", warning=True)

    def is_dispensable(self, placement: Placement) -> bool:
        """Whether it is a trainer that is not ready yet, in a running job that has others."""
        others = any(own.active for own in self.job.trainers)
        return self.job.plan is not None and placement.kind is ProcessKind.TRAINER and not placement.active and others

    def excluded(self, nodes: Mapping[str, NodeView]) -> frozenset[str]:
        """The excluded nodes that are still in the same incarnation."""
        return frozenset(
            node_id
            for node_id, incarnation, _ in self.job.excluded
            if node_id in nodes and nodes[node_id].incarnation == incarnation
        )

    def has_waited(self, seconds: float) -> bool:
        """Whether `seconds` have passed since the wait began. The first call begins it; a shorter one shortens it."""
        until = self.now.mono_s + seconds
        if self.job.deadline_s is None or until < self.job.deadline_s:
            self.update(deadline_s=until)
        return self.job.deadline_s is not None and self.now.mono_s >= self.job.deadline_s
