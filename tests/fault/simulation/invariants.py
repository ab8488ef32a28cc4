"""What must hold after every event, whatever happened: the promises, restated without the product's own code.

A `Monitor` looks at the processes from outside. It compares every version that any partition ever holds, every value
that a trainer computes on, and every part that the catalogue takes, with the `Reference`, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pscluster.errors import StorageError
from pscluster.step.codec import as_bytes
from pscluster.storage.snapshot import read_part
from psmaster.control.loop import MAX_WAITING, ControlLoop
from psmaster.model.job import MAX_EVENTS, Job, JobState
from psmaster.model.plan import Part, counted_on
from psserver.partition.step.voting import CommitDecision
from tests.fault.simulation import model
from tests.fault.simulation.model import LAYOUT, Reference

Restore = tuple[str, int]  # job, generation of the restore that began it


class Violation(AssertionError):
    """A promise was broken."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


@dataclass
class _Watched:
    """A living partition process and what was seen of it last."""

    process: Any
    restore_generation: int = -1
    version: int = -1
    step: int = -1
    open_step: Any = None
    was_filled: bool = False


@dataclass
class Monitor:
    """Without a `reference` it makes one, `recorded`: of a job on one partition, undisturbed."""

    reference: Reference | None = None
    recorded: Reference = field(default_factory=Reference)
    acknowledged: set[str] = field(default_factory=set)  # jobs of which a person was told that they are taken in
    damaged: set[str] = field(default_factory=set)  # files that a fault has spoilt
    committed: dict[Restore, int] = field(default_factory=dict)  # the newest step decided since a restore
    num_checks: int = 0
    num_turns: int = 0  # of the master
    _partitions: list[_Watched] = field(default_factory=list)
    _trainers: list[Any] = field(default_factory=list)
    _owners: dict[tuple[str, int, int, int], str] = field(default_factory=dict)
    _decisions: dict[tuple[str, int, int], tuple[Any, ...]] = field(default_factory=dict)
    _generations: dict[str, int] = field(default_factory=dict)
    _known_parts: dict[str, Mapping[tuple[int, int], Part]] = field(default_factory=dict)
    _places: dict[str, tuple[str, str]] = field(default_factory=dict)
    _drained: frozenset[str] = frozenset()  # nodes of which a turn before knew that they drain
    _core: ControlLoop | None = None

    # who is watched

    def watch_partition(self, process: Any) -> None:
        self._partitions.append(_Watched(process))

    def forget_partition(self, process: Any) -> None:
        self._partitions = [watched for watched in self._partitions if watched.process is not process]

    def watch_trainer(self, process: Any) -> None:
        self._trainers.append(process)

    def forget_trainer(self, process: Any) -> None:
        self._trainers.remove(process)

    # after every event

    def check(self) -> None:
        """Look at every partition that moved."""
        self.num_checks += 1
        moved = False
        for watched in self._partitions:
            service = watched.process.service
            if service.plan is None or service.state is None:
                continue
            if service.step is not watched.open_step:
                self._restored(watched)
            if service.member.step != watched.step:
                watched.step, moved = service.member.step, True
            if service.version != watched.version or (not watched.was_filled and service.state.is_filled):
                self._new_version(watched)
        if moved:
            self._stay_together()
        if self.num_checks % 64 == 0:
            self._stay_bounded()

    def _restored(self, watched: _Watched) -> None:
        """A partition began after a restore: its decisions are watched from here on."""
        service = watched.process.service
        restore_generation = service.plan.restore_generation
        rises = restore_generation > watched.restore_generation or (
            restore_generation == watched.restore_generation and _stands_by(service)
        )
        require(rises, f"{watched.process.process_id} went back to restore {restore_generation}")
        watched.restore_generation, watched.version, watched.was_filled = restore_generation, -1, False
        watched.open_step = service.step
        decide = service.step.decide
        service.step.decide = lambda decision: (self._decides(watched, decision), decide(decision))

    def _decides(self, watched: _Watched, decision: CommitDecision) -> None:
        """A partition carries out a decision: it alone may, all carry out the same, and every shard is in once."""
        process, service = watched.process, watched.process.service
        job_id, restore_generation, index = process.job_id, watched.restore_generation, service.index
        place = (job_id, restore_generation, index, service.plan.generation)
        owner = process.process_id if _stands_by(service) else self._owners.setdefault(place, process.process_id)
        require(owner == process.process_id, f"{owner} and {process.process_id} both commit for {place}")
        said = (decision.kind, decision.scale, decision.norm, decision.snapshot, decision.last)
        known = self._decisions.setdefault((job_id, restore_generation, decision.step), said)
        require(
            known == said,
            f"two decisions on step {decision.step} since restore {restore_generation}: {known} and {said}",
        )
        tally = service.step.summary.root.samples
        wanted = model.tally_of(service.spec.train.num_shards)
        require(tally == wanted, f"step {decision.step}: shards count {int(tally):b} in twos, not {int(wanted):b}")
        require(decision.step == service.member.step - 1, "a decision on another step is carried out")
        held = self.committed.get((job_id, restore_generation), -1)
        self.committed[job_id, restore_generation] = max(held, decision.step + 1)

    def _new_version(self, watched: _Watched) -> None:
        """All of a partition is at a version: it must be that version, bit for bit."""
        process, service = watched.process, watched.process.service
        if not service.state.is_filled or service.step.next_update() is not None:
            return
        rises = service.version > watched.version or not watched.was_filled
        require(rises, f"{process.process_id} went from version {watched.version} to {service.version}")
        watched.version, watched.was_filled = service.version, True
        what = f"{process.process_id}, restore {watched.restore_generation}, version {service.version}"
        reference = self.reference
        if reference is None:
            self._record(service)
        else:
            pieces = {key: bytes(piece) for key, piece in service.state.pieces().items()}
            self._compare(reference, service.version, service.index, service.spec.servers.partitions, pieces, what)
            require(
                tuple(service.state.update_counts) == reference.update_counts[service.version],
                f"{what}: the ages differ",
            )

    def _compare(
        self, reference: Reference, version: int, index: int, partitions: int, pieces: Mapping[Any, bytes], what: str
    ) -> None:
        require(version in reference.pieces, f"{what}: there is no such version")
        for (bucket, name), whole in reference.pieces[version].items():
            wanted = model.part_of(whole, index, partitions, bucket)
            found = bytes(pieces.get((bucket, name), b""))
            require(found == wanted, f"{what}: {name} of bucket {bucket} differ from the undisturbed run's")

    def _record(self, service: Any) -> None:
        """One partition holds everything: what it is makes the reference."""
        self.recorded.pieces[service.version] = {key: bytes(data) for key, data in service.state.pieces().items()}
        self.recorded.update_counts[service.version] = tuple(service.state.update_counts)

    def _stay_together(self) -> None:
        """Of two processes of one partition that live since one restore, the one before lags as it likes."""
        steps: dict[Restore, dict[int, int]] = {}
        for watched in sorted(self._partitions, key=lambda watched: watched.process.service.member.generation):
            if watched.step >= 0 and not _stands_by(watched.process.service):
                restore_generation = (watched.process.job_id, watched.restore_generation)
                steps.setdefault(restore_generation, {})[watched.process.service.index] = watched.step
        for restore_generation, held in steps.items():
            apart = max(held.values()) - min(held.values())
            require(apart <= 1, f"partitions of {restore_generation} are at {held}, two steps apart")

    def computes(self, name: str, work: Any, flats: Any) -> None:
        """A trainer begins a microbatch: on the version that its gradients will be for."""
        reference = self.reference
        if reference is None:
            return
        for bucket, wanted in zip(LAYOUT.buckets, reference.values(work.version), strict=True):
            same = bytes(as_bytes(flats[bucket.index])) == wanted
            require(same, f"{name} computes step {work.version} on another version of bucket {bucket.index}")

    def _stay_bounded(self) -> None:
        for watched in self._partitions:
            early = len(watched.process.service.handler.early)
            require(early <= 64, f"{watched.process.process_id} holds {early} early frames")
        for trainer in self._trainers:
            for peer in trainer.exchange.pusher.peers:
                pending = len(peer.pushes.queue)
                require(pending <= 64, f"{trainer.process_id} has {pending} frames for partition {peer.index}")
        if self._core is not None:
            require(len(self._core._inputs) < MAX_WAITING, "the master's inputs pile up")

    # the master

    def master_loaded(self, core: ControlLoop) -> None:
        """A master starts again: what was acknowledged is there."""
        self._core = core
        lost = self.acknowledged - core.state.jobs.keys()
        require(not lost, f"acknowledged and lost: {sorted(lost)}")
        self.master_committed(core)

    def master_committed(self, core: ControlLoop) -> None:
        """The master's state is another one."""
        self.num_turns += 1
        drained, self._drained = self._drained & core.state.drains.keys(), frozenset(core.state.drains)
        for job in core.state.jobs.values():
            require(job.generation >= self._generations.get(job.job_id, 0), f"{job.job_id}'s generation fell")
            self._generations[job.job_id] = job.generation
            require(len(core.state.events[job.job_id]) <= MAX_EVENTS, "more events than are kept")
            self._judge_progress(job)
            self._judge_placements(job, drained)
            self._judge_parts(core, job)
        slots = Counter(
            placement.node_id for job in core.state.jobs.values() for placement in job.placements if placement.placed
        )
        require(all(count <= model.SLOTS for count in slots.values()), f"slots are oversold: {slots}")

    def _judge_progress(self, job: Job) -> None:
        """What people see was truly committed since the job's newest restore."""
        if job.plan is None:
            return
        restore_generation, resume = job.plan.restore_generation, job.plan.resume_step
        committed = max(resume, self.committed.get((job.job_id, restore_generation), 0))
        require(
            job.step <= committed, f"{job.job_id} shows step {job.step}; restore {restore_generation} is at {committed}"
        )
        if job.finished is not None and not job.finished.stopped:
            require(job.finished.step == job.final_step, f"{job.job_id} finished at {job.finished.step}")
        if job.state is JobState.SUCCEEDED:
            wanted = self.reference.digest(job.final_step) if self.reference else job.parameters_sha256
            require(job.parameters_sha256 == wanted, f"{job.job_id} ended with other parameters")

    def _judge_placements(self, job: Job, drained: frozenset[str]) -> None:
        plan = job.plan
        for placement in [placement for placement in job.placements if placement.placed]:
            place, process_id = (placement.node_id, placement.incarnation), placement.process_id(job.job_id)
            starts_in_vain = process_id not in self._places and placement.node_id in drained
            require(not starts_in_vain, f"{process_id} is to start on {placement.node_id}, which drains")
            require(self._places.setdefault(process_id, place) == place, f"the process id {process_id} was used twice")
        if plan is None or not counted_on(plan.trainers):
            return
        dealt = sorted(
            s for placement in plan.trainers for first, count in placement.shards for s in range(first, first + count)
        )
        require(dealt == list(range(job.num_shards)), f"generation {plan.generation} deals the shards {dealt}")

    def _judge_parts(self, core: ControlLoop, job: Job) -> None:
        """A part that is new in the catalogue is of the present, is on the disk, and is what that step is."""
        parts = core.state.catalogues[job.job_id].parts
        known = self._known_parts.get(job.job_id, {})
        if parts is known:
            return
        self._known_parts[job.job_id] = parts
        for key, part in parts.items():
            if known.get(key) == part:
                continue
            oldest = job.plan.restore_generation if job.plan is not None else 0
            held = known.get(key)
            is_new = held is None or part.generation >= held.generation
            require(is_new, f"the catalogue replaces a part of {key} by one of an older generation")
            if job.plan is not None:
                require(part.generation <= job.generation, f"a part of generation {part.generation} is not yet due")
            if part.step > (job.plan.resume_step if job.plan else 0):
                require(part.generation >= oldest, f"the catalogue takes {part.path}; the restore was in {oldest}")
            self._judge_file(job, part)
        self.files_changed()

    def _judge_file(self, job: Job, part: Part) -> None:
        path = Path(job.store) / part.path
        if str(path) in self.damaged:
            return
        try:
            read = read_part(path)
        except StorageError as error:
            raise Violation(f"the catalogue counts a part that cannot be read: {error.cause}") from None
        if self.reference is not None:
            pieces = {key: bytes(data) for key, data in read.pieces.items()}
            count = job.spec.servers.partitions
            self._compare(self.reference, part.step, part.partition, count, pieces, f"the snapshot part {part.path}")

    def files_survived(self) -> None:
        """The power was gone: what counts is whole all the same."""
        if self._core is not None:
            for job_id, catalogue in self._core.state.catalogues.items():
                for part in catalogue.parts.values():
                    self._judge_file(self._core.state.jobs[job_id], part)

    def files_changed(self) -> None:
        """Every snapshot that the catalogue calls complete is there, all of it."""
        if self._core is None:
            return
        for job_id, catalogue in self._core.state.catalogues.items():
            job = self._core.state.jobs[job_id]
            for step in catalogue.complete_steps():
                for index in range(job.spec.servers.partitions):
                    part = catalogue.parts.get((step, index))
                    require(part is not None, f"step {step} of {job_id} is called complete without part {index}")
                    assert part is not None
                    path = Path(job.store) / part.path
                    require(path.exists() or str(path) in self.damaged, f"{part.path} is counted and not there")


def _stands_by(service: Any) -> bool:
    """Whether a partition's process only follows the one that is the partition."""
    return getattr(service, "standby", None) is not None
