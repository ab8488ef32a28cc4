"""A transaction: inputs applied to the master's state, then everything reconciled. No I/O; time is an argument.

The driver (the daemon, a simulator) applies inputs, calls `finish`, makes the result durable, and only then replaces
its state and sends what follows from it. A transaction that cannot be made durable is dropped: nothing has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pscluster.errors import NotFoundError, StateError
from pscluster.security.identity import Role
from psmaster.model import access, membership, reports
from psmaster.model.access import CertificateRecord, TokenRecord
from psmaster.model.job import (
    MAX_EVENTS,
    AuditMismatch,
    Event,
    Finished,
    Instant,
    Job,
    JobState,
    JobWarning,
    request_stop,
    resume_job,
)
from psmaster.model.membership import Node, NodeView
from psmaster.model.plan import Part, Placement, ProcessKind
from psmaster.model.process import (
    REACHES_ALL,
    Exit,
    Failure,
    PartitionFacts,
    Process,
    TrainerFacts,
    Unreached,
    with_measurement,
)
from psmaster.model.reports import Applied, Connected, Evaluated, MetricLine, Progress, StandbyState
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.model.state import Changes, Deletion, State, find, node_views, prune_deletions, queue, queue_key
from psmaster.scheduling.admission import admit
from psmaster.scheduling.draft import Limits
from psmaster.scheduling.reconcile import reconcile

JobReport = Progress | Evaluated | Finished | Part | JobWarning | Connected | StandbyState | AuditMismatch
Report = TrainerFacts | PartitionFacts | Failure | JobReport


class Transaction:
    """Used once. Methods that refuse raise before they change anything."""

    def __init__(self, state: State, now: Instant, limits: Limits) -> None:
        self.before = state
        self.now = now
        self.limits = limits
        self.jobs = dict(state.jobs)
        self.catalogues = dict(state.catalogues)
        self.nodes = state.nodes
        self.processes = dict(state.processes)
        self.drains = state.drains
        self.deletions = state.deletions
        self.access = state.access
        self._events: list[tuple[str, Event]] = []
        self._lines: list[tuple[str, MetricLine]] = []
        self._cuts: dict[str, int] = {}
        self._unsettled = False

    # from agents

    def register(self, node: Node) -> None:
        """A node registers. Raises StateError for an incarnation that a newer one replaced."""
        self.nodes = membership.register(self.nodes, node, self.now, self.limits.suspicion_s)
        self._unsettled = True

    def open_stream(self, node_id: str, incarnation: str, processes: tuple[Process, ...]) -> None:
        """A node's stream opens with all its processes. Raises StateError for an unregistered incarnation."""
        self.nodes = membership.open_stream(self.nodes, node_id, incarnation, self.now)
        for process in processes:
            if self._placement_of(process.process_id, node_id) is not None:
                known, now_s = self.processes.get(process.process_id, process), self.now.mono_s
                unreached = replace(process.unreached, since_s=now_s)
                self.processes[process.process_id] = replace(
                    process, failure=known.failure, speed=known.speed, suspect_since_s=now_s, unreached=unreached
                )
        self._unsettled = True

    def detach(self, node_id: str, incarnation: str, *, for_good: bool = False) -> None:
        """A node's stream broke; `for_good`: it sent a Goodbye."""
        self.nodes = (membership.leave if for_good else membership.detach)(self.nodes, node_id, incarnation)
        self._unsettled = True

    def beat(self, node_id: str, incarnation: str, speeds: Mapping[str, tuple[float, int]] | None = None) -> None:
        """A node is alive. `speeds`: of its trainers by process id, seconds a microbatch and how many were measured."""
        self.nodes = membership.beat(self.nodes, node_id, incarnation, self.now)
        for process_id, (microbatch_s, microbatches) in (speeds or {}).items():
            if self._placement_of(process_id, node_id) is not None:
                held = self._known(process_id, node_id)
                measured = with_measurement(held.speed, microbatch_s, microbatches, self.now.mono_s)
                self.processes[process_id] = replace(held, speed=measured)

    def leaving(self, node_id: str, incarnation: str) -> None:
        """A node is about to end and waits a moment for its processes to be moved."""
        self.nodes = membership.announce_leave(self.nodes, node_id, incarnation)
        self._unsettled = True

    def exited(self, node_id: str, process_id: str, exit_: Exit) -> None:
        """A process ended. Of one that no placement has any more it changes nothing."""
        if self._placement_of(process_id, node_id) is not None:
            self._know(process_id, node_id, exit=exit_)

    def suspected(self, node_id: str, process_id: str, suspicion: str, unreached: Unreached = REACHES_ALL) -> None:
        """A process makes no progress ("silent", "stalled"), or recovered (empty); what it cannot reach. Repeats change
        nothing."""
        if self._placement_of(process_id, node_id) is None:
            return
        held = self._known(process_id, node_id)
        since_s = held.unreached.since_s if held.unreached.partitions else self.now.mono_s
        if replace(unreached, since_s=held.unreached.since_s) != held.unreached:
            self._know(process_id, node_id, unreached=replace(unreached, since_s=since_s))
        if held.suspicion != suspicion:
            self._know(process_id, node_id, suspicion=suspicion, suspect_since_s=self.now.mono_s)

    def reported(self, node_id: str, process_id: str, report: Report) -> None:
        """Of a replaced process only a snapshot part that was durable in time counts, whoever wrote it."""
        job = self.jobs.get(process_id.partition("/")[0])
        if job is None:
            return
        if isinstance(report, Part):
            snapshots = self.catalogues[job.job_id]
            applied, self.catalogues[job.job_id] = reports.snapshot_part(job, snapshots, report, self.now)
            self._take(applied)
            return
        placement = self._placement_of(process_id, node_id)
        if placement is None:
            return
        if isinstance(report, TrainerFacts | PartitionFacts | Failure):
            name = {TrainerFacts: "trainer", PartitionFacts: "partition", Failure: "failure"}[type(report)]
            self._know(process_id, node_id, **{name: report})
        elif isinstance(report, JobWarning):
            self._take(reports.warning(job, report, placement.title, self.now))
        elif placement.standby:
            return
        elif isinstance(report, StandbyState):
            self._take(reports.standby_state(job, report, placement.rank, self.now))
        elif isinstance(report, Connected):
            self._take(reports.connected(job, report, placement.rank))
        elif placement.kind is not ProcessKind.PARTITION or placement.rank:
            return  # only the coordinator's reports on the whole job count
        elif isinstance(report, Progress):
            self._take(reports.progress(job, report, self.now))
        elif isinstance(report, AuditMismatch):
            self._take(reports.audit_mismatch(job, report, self.now))
        elif isinstance(report, Evaluated):
            self._take(reports.evaluated(job, report, self.catalogues[job.job_id]))
        else:
            self._take(reports.finished(job, report, self.now))

    def warned(self, job_id: str, warning: JobWarning, source: str) -> None:
        """The master itself has a warning about a job."""
        if job_id in self.jobs:
            self._take(reports.warning(self.jobs[job_id], warning, source, self.now))

    def removed(self, job_id: str) -> None:
        """Nothing is left in the store of a deleted job."""
        if job_id in self.deletions:
            self.deletions = {**self.deletions, job_id: replace(self.deletions[job_id], removed=True)}

    def _known(self, process_id: str, node_id: str) -> Process:
        return self.processes.get(process_id) or Process(process_id=process_id, node_id=node_id)

    def _know(self, process_id: str, node_id: str, **facts: Any) -> None:
        self.processes[process_id] = replace(self._known(process_id, node_id), **facts)
        self._unsettled = True

    def _placement_of(self, process_id: str, node_id: str) -> Placement | None:
        """The placement that this very process fills on that node."""
        job = self.jobs.get(process_id.partition("/")[0])
        for placement in job.placements if job else ():
            if placement.node_id == node_id and job and placement.process_id(job.job_id) == process_id:
                return placement
        return None

    def _take(self, applied: Applied) -> None:
        job_id = applied.job.job_id
        if applied.job != self.jobs[job_id]:
            self.jobs[job_id] = applied.job
        self._events += [(job_id, event) for event in applied.events]
        self._lines += [(job_id, line) for line in applied.lines]
        self._unsettled = True

    # from clients

    def submit(self, job: Job) -> str:
        """Add a new job; its id. A repeated request gives the first one's id. StateError: the id is taken."""
        for held in self.jobs.values():
            if job.request_id and held.request_id == job.request_id:
                if held.owner != job.owner:
                    raise StateError("another user's request has this id", action="submit again with an id of your own")
                return held.job_id
        if job.job_id in self.jobs or job.job_id in self.deletions:
            raise StateError(f"job id {job.job_id} is taken", action="submit again")
        self.jobs[job.job_id] = job
        self.catalogues[job.job_id] = Catalogue(num_partitions=job.spec.servers.partitions)
        event = Event(time_s=self.now.unix_s, reason="Submitted", message=f"submitted as {job.job_id}")
        self._events.append((job.job_id, event))
        self._unsettled = True
        return job.job_id

    def stop(self, name: str) -> str:
        """Ask a job to stop; its id. NotFoundError, StateError (it has ended otherwise)."""
        job = find(self.jobs, name, self.now)
        return self._asked(*request_stop(job, self.now))

    def resume(self, name: str) -> str:
        """Queue an ended job again; its id. NotFoundError, StateError (it succeeded)."""
        job = find(self.jobs, name, self.now)
        has_snapshot = self.catalogues[job.job_id].newest() is not None
        return self._asked(*resume_job(job, has_snapshot, self.now))

    def delete(self, name: str) -> Job:
        """Forget an ended job; what it was. NotFoundError, StateError (it has not ended)."""
        job = find(self.jobs, name, self.now)
        if not job.state.ended:
            raise StateError(f"job {job.job_id} is {job.state}", action=f"stop it first: psctl stop {job.job_id}")
        del self.jobs[job.job_id], self.catalogues[job.job_id]
        never_wrote = job.generation == 0  # it had no plan, and so no snapshot
        deletion = Deletion(job_id=job.job_id, store=job.store, deleted_s=self.now.unix_s, removed=never_wrote)
        self.deletions = {**self.deletions, job.job_id: deletion}
        self._unsettled = True
        return job

    def drain(self, node_id: str, *, undo: bool = False) -> None:
        """Have everything moved away from a node, and nothing placed there; `undo`: let it be given processes again.
        Repeating it changes nothing. NotFoundError."""
        if node_id not in self.nodes and node_id not in self.drains:
            raise NotFoundError(f"there is no node {node_id!r}", action="see `psctl nodes`")
        drains = {**self.drains, node_id: self.drains.get(node_id, self.now.unix_s)}
        self.drains = {k: since_s for k, since_s in drains.items() if not (undo and k == node_id)}
        self._unsettled = True

    # who may be a member

    def create_token(self, token: TokenRecord) -> None:
        """Let whoever has the secret of a token join. CallerError, StateError."""
        self.access = access.add_token(self.access, token, self.now.unix_s)

    def revoke_token(self, token_id: str) -> None:
        """Make a token useless. NotFoundError."""
        self.access = access.revoke_token(self.access, token_id)

    def join(self, digest: str, made: CertificateRecord) -> None:
        """A certificate was made for the holder of a token: it may be handed out. AuthError, StateError."""
        self.access = access.join(self.access, digest, made, self.now.unix_s)

    def renew(self, made: CertificateRecord, serial: str) -> None:
        """A certificate was made for the holder of another, `serial`. AuthError, StateError."""
        self.access = access.renew(self.access, serial, made, self.now.unix_s)

    def revoke_certificates(self, name: str, role: Role | None) -> tuple[CertificateRecord, ...]:
        """Refuse a member from now on; its certificates. A node counts as lost at once. NotFoundError."""
        self.access, refused = access.revoke_certificates(self.access, name, role)
        for node_id in {one.name for one in refused if one.role in (Role.WORKER, Role.SERVER)}:
            self.nodes = {held: node for held, node in self.nodes.items() if held != node_id}
            self._unsettled = True
        return refused

    def _asked(self, job: Job, event: Event | None) -> str:
        if event is not None:
            self._take(Applied(job=job, events=(event,)))
        return job.job_id

    # the outcome

    def tick(self) -> None:
        self._unsettled = True

    def event_loop_stalled(self, seconds: float) -> None:
        """The master committed nothing for so long (suspended, disk full): do not count it as silence of the nodes."""
        self.nodes = membership.shift_last_seen(self.nodes, seconds)

    def finish(self) -> Changes:
        """Reconcile everything and close the transaction."""
        if self._unsettled:
            self._settle()
        with_events = {job_id for job_id, _ in self._events}
        for job_id, job in self.jobs.items():
            held = self.before.jobs.get(job_id)
            if held is not None and (job is not held or job_id in with_events):
                self.jobs[job_id] = replace(job, revision=held.revision + 1)
        events = tuple(entry for entry in self._events if entry[0] in self.jobs)
        state = State(
            jobs=self.jobs,
            catalogues=self.catalogues,
            events=self._all_events(events),
            nodes=self.nodes,
            processes=self.processes,
            drains=self.drains,
            deletions=prune_deletions(self.deletions, self.now.unix_s),
            access=access.prune_access(self.access, self.now.unix_s),
        )
        return Changes(state=state, events=events, lines=tuple(self._lines), cuts=self._cuts)

    def _all_events(self, new: tuple[tuple[str, Event], ...]) -> Mapping[str, tuple[Event, ...]]:
        if not new and self.jobs.keys() == self.before.events.keys():
            return self.before.events
        all_events = {job_id: self.before.events.get(job_id, ()) for job_id in self.jobs}
        for job_id, event in new:
            all_events[job_id] = (*all_events[job_id], event)[-MAX_EVENTS:]
        return all_events

    def _settle(self) -> None:
        """Live jobs first (they may free slots), then the queue in its order, then growth with what is left."""
        self.nodes = membership.forget(self.nodes, self.now)
        for job in [job for job in self.jobs.values() if job.state.live]:
            self._reconcile(job.job_id)
        ahead = ""
        for job in queue(self.jobs):
            self._reconcile(job.job_id, ahead=ahead)
            waits = self.jobs[job.job_id].state is JobState.QUEUED
            if waits and not ahead and admit(job.spec, self._views(job.job_id)).possible:
                ahead = job.job_id  # it gets the next free slots; a job that can never run does not block others
        if not ahead:
            for job in sorted(self.jobs.values(), key=queue_key):
                if job.state.live:
                    self._reconcile(job.job_id, grow=True)
        wanted = {
            placement.process_id(job.job_id)
            for job in self.jobs.values()
            for placement in job.placements
            if placement.placed
        }
        self.processes = {key: process for key, process in self.processes.items() if key in wanted}

    def _reconcile(self, job_id: str, *, grow: bool = False, ahead: str = "") -> None:
        job, nodes, snapshots = self.jobs[job_id], self._views(job_id), self.catalogues[job_id]
        outcome = reconcile(job, nodes, self.processes, snapshots, self.now, self.limits, grow=grow, ahead=ahead)
        self.jobs[job_id] = outcome.job
        self.catalogues[job_id] = outcome.snapshots
        self._events += [(job_id, event) for event in outcome.events]
        if outcome.cut_to is not None:
            self._cuts[job_id] = outcome.cut_to

    def _views(self, job_id: str) -> Mapping[str, NodeView]:
        return node_views(self.jobs, self.nodes, job_id, self.now, self.limits.suspicion_s, self.drains)
