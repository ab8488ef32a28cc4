"""A seeded cluster in which anything may happen in any order, with the invariants checked after every turn.

A failing case names its seed; `python -m pytest tests/unit/master/test_simulation.py -k "seed_7"` repeats it exactly.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from psmaster.control.transaction import Transaction
from psmaster.model.job import VOLATILE, Job, JobState
from psmaster.model.plan import Placement, ProcessKind, counted_on
from psmaster.model.reports import Progress, StandbyState
from psmaster.scheduling.reconcile import reconcile
from tests.harness.master_world import PARTITION, TRAINER, World, failure

JOBS = ("one-aaaaaa", "two-aaaaaa")
NODES = ("worker-0", "worker-1", "worker-2", "server-0", "server-1", "server-2")
PLACEMENTS = ("trainer-0", "trainer-1", "trainer-2", "partition-0", "partition-1", "standby-0", "standby-1")
DEATHS = ({"signal": 9}, {"exit_code": 1}, {"out_of_memory": True})
NUM_SEEDS = 75
NUM_ACTIONS = 60
ACTIONS = {
    "go_on": 12,
    "process_dies": 4,
    "stale_steps": 3,
    "part_is_durable": 3,
    "process_is_ready": 3,
    "standby_is_judged": 4,
    "time_passes": 3,
    "restart_agent": 2,
    "stream_breaks": 2,
    "stream_is_back": 4,
    "master_restarts": 2,
    "node_drains": 2,
    "node_is_used_again": 2,
    "coordinator_rests": 4,
    "trainers_measure": 6,
    "code_raises": 1,
    "coordinator_finishes": 1,
    "stop": 1,
    "resume": 2,
}


class Simulation:
    """Agents, two jobs, and a master that may be restarted at any moment. Every choice comes from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.world = World()
        self.lives = 0
        self.measured = 0
        self.generations: dict[str, int] = {}
        self.places: dict[str, tuple[str, str]] = {}  # of every process id there ever was: node and its life
        self.relied_on: dict[str, int] = {}  # by process id: the restore generation in which it was last in sync
        self.held: dict[
            str, tuple[int, list[str]]
        ] = {}  # by job: the restore generation of its plan, and who held the partitions
        self.world.submit(JOBS[0], name="one")
        strict = {"numerics": "strict"}
        self.world.submit(JOBS[1], name="two", workers={"min": 2}, train=strict, durability={"tier": "replica"})
        for node_id in NODES:
            self.world.join(node_id, slots=2)

    def act(self) -> None:
        """One thing happens."""
        name = self.random.choices(list(ACTIONS), weights=list(ACTIONS.values()))[0]
        getattr(self, name)(self.random.choice(JOBS), self.random.choice(NODES), self.random.choice(PLACEMENTS))
        self.check()

    # what may happen; each takes a job, a node and a placement, and uses what it needs

    def go_on(self, job_id: str, _node: str, _placement: str) -> None:
        """What a healthy cluster does: all become ready, steps are committed, sometimes a snapshot is taken."""
        self.world.ready(job_id)
        job = self.world.job(job_id)
        if job.plan is None or "partition-0" not in self.world.wanted(job_id):
            return
        step = job.step + self.random.randint(1, 12)
        self.world.commit(*range(job.step + 1, step + 1), job_id=job_id)
        if self.random.random() < 0.5:
            self.world.snapshot(step, job_id)

    def restart_agent(self, _job: str, node_id: str, _placement: str) -> None:
        self.lives += 1
        self.world.join(node_id, slots=2, life=f"again{self.lives}")

    def stream_breaks(self, _job: str, node_id: str, _placement: str) -> None:
        self.world.take(lambda tx: tx.detach(node_id, self.world.lives[node_id]))

    def stream_is_back(self, _job: str, node_id: str, _placement: str) -> None:
        facts = tuple(p for p in self.world.state.processes.values() if p.node_id == node_id)
        self.world.rejoin(node_id, *facts, slots=2)

    def time_passes(self, _job: str, node_id: str, _placement: str) -> None:
        silent = frozenset({node_id}) if self.random.random() < 0.5 else frozenset()
        self.world.wait(self.random.choice((0.5, 1.0, 4.0)), silent=silent)

    def master_restarts(self, _job: str, _node: str, _placement: str) -> None:
        facts = self.world.state.processes
        attended = [node_id for node_id, node in self.world.state.nodes.items() if node.connected]
        self.world.restart()
        for node_id in attended:
            self.world.rejoin(node_id, *(p for p in facts.values() if p.node_id == node_id), slots=2)

    def process_is_ready(self, job_id: str, _node: str, placement: str) -> None:
        process = self.world.wanted(job_id).get(placement)
        if process is None or process.process_id in self.world.state.processes:
            return
        numerics = self.random.choice("NNNM") * 16
        self.world.report(
            placement,
            replace(TRAINER, numerics_class=numerics) if placement.startswith("trainer") else PARTITION,
            job_id,
        )

    def standby_is_judged(self, job_id: str, _node: str, placement: str) -> None:
        """A partition says that its standby is in sync, or does not answer; maybe it said so under an older plan."""
        job, rank = self.world.job(job_id), int(placement[-1]) % 2
        standby = job.standby(rank)
        if job.plan is None or standby is None or f"partition-{rank}" not in self.world.wanted(job_id):
            return
        named = [own.attempt for own in job.plan.standbys if own.rank == rank]
        attempt = self.random.choice([*named, *named, *named, standby.attempt - 1])
        generation = max(0, job.generation - self.random.choice((0, 0, 0, 1)))
        statement = StandbyState(generation=generation, attempt=attempt, in_sync=self.random.random() < 0.9)
        partition = job.placement(ProcessKind.PARTITION, rank)
        assert partition is not None
        if statement.in_sync and attempt == standby.attempt and job.counts(generation) and job.plan.holds(partition):
            self.relied_on[standby.process_id(job_id)] = job.restore_generation
        if job.plan.holds(partition):  # nobody else would say so
            self.world.report(f"partition-{rank}", statement, job_id)

    def process_dies(self, job_id: str, _node: str, placement: str) -> None:
        if placement in self.world.wanted(job_id):
            self.world.exit(placement, job_id, **self.random.choice(DEATHS))

    def stale_steps(self, job_id: str, _node: str, _placement: str) -> None:
        job = self.world.job(job_id)
        if job.plan is not None and "partition-0" in self.world.wanted(job_id):
            generation = max(0, job.generation - self.random.randint(1, 2))
            self.world.commit(job.step + 1, job_id=job_id, generation=generation)

    def part_is_durable(self, job_id: str, _node: str, placement: str) -> None:
        job = self.world.job(job_id)
        if placement.startswith("partition") and placement in self.world.wanted(job_id):
            generation = max(0, job.generation - self.random.randint(0, 2))
            self.world.report(placement, self.world.part(job.step, int(placement[-1]), job_id, generation), job_id)

    def code_raises(self, job_id: str, _node: str, placement: str) -> None:
        if placement in self.world.wanted(job_id):
            self.world.report(placement, failure("PS-2001", "ValueError"), job_id)

    def node_drains(self, _job: str, node_id: str, _placement: str) -> None:
        if node_id in self.world.state.nodes:
            self.world.take(lambda tx: tx.drain(node_id))

    def node_is_used_again(self, _job: str, node_id: str, _placement: str) -> None:
        if node_id in self.world.state.drains:
            self.world.take(lambda tx: tx.drain(node_id, undo=True))

    def coordinator_rests(self, job_id: str, _node: str, _placement: str) -> None:
        job = self.world.job(job_id)
        if job.plan is None or not job.plan.save or "partition-0" not in self.world.wanted(job_id):
            return
        step = job.step + self.random.randint(0, 1)
        self.world.report("partition-0", Progress(generation=job.generation, step=step, held=True), job_id)
        if self.random.random() < 0.7:
            self.world.snapshot(step, job_id)

    def trainers_measure(self, job_id: str, _node: str, _placement: str) -> None:
        for process in self.world.wanted(job_id).values():
            if process.placement.kind is ProcessKind.TRAINER:
                self.measured += 1
                received = {process.process_id: (self.random.choice((0.1, 0.1, 0.5)), self.measured)}
                node_id, life = process.placement.node_id, process.placement.incarnation
                self.world.take(
                    lambda tx, node_id=node_id, life=life, received=received: tx.beat(node_id, life, received)
                )

    def coordinator_finishes(self, job_id: str, _node: str, _placement: str) -> None:
        job = self.world.job(job_id)
        if job.plan is not None and "partition-0" in self.world.wanted(job_id):
            self.world.finish(job.step, stopped=job.stopping, job_id=job_id)

    def stop(self, job_id: str, _node: str, _placement: str) -> None:
        if not self.world.job(job_id).state.ended:
            self.world.take(lambda tx: tx.stop(job_id))

    def resume(self, job_id: str, _node: str, _placement: str) -> None:
        if self.world.job(job_id).state in (JobState.STOPPED, JobState.FAILED):
            self.world.take(lambda tx: tx.resume(job_id))

    # what must always hold

    def check(self) -> None:
        self._settling_again_changes_nothing()
        self._what_is_stored_is_what_is_known()
        held: Counter[str] = Counter()
        for job in self.world.state.jobs.values():
            self._generations_only_rise(job)
            self._processes_are_new_and_meet_only_their_plan(job)
            self._only_those_in_sync_take_over(job)
            _check_standbys(job)
            _check_plan(job)
            _check_rest(job)
            held.update(placement.node_id for placement in job.placements if placement.placed)
        assert all(count <= 2 for count in held.values()), "slots are oversold"

    def _settling_again_changes_nothing(self) -> None:
        tx = Transaction(self.world.state, self.world.now, self.world.limits)
        tx.tick()
        changes = tx.finish()
        assert changes.state.jobs == self.world.state.jobs
        assert changes.state.catalogues == self.world.state.catalogues
        assert changes.events == ()
        assert changes.cuts == {}

    def _what_is_stored_is_what_is_known(self) -> None:
        for job in self.world.store.jobs():
            known = self.world.state.jobs[job.job_id]
            forgotten = {name: Job.__dataclass_fields__[name].default for name in VOLATILE}
            assert job == replace(known, **forgotten)
            stored = {(part.step, part.partition): part for part in self.world.store.parts(job.job_id)}
            assert stored == dict(self.world.state.catalogues[job.job_id].parts)

    def _generations_only_rise(self, job: Job) -> None:
        assert job.generation >= self.generations.get(job.job_id, 0)
        self.generations[job.job_id] = job.generation

    def _processes_are_new_and_meet_only_their_plan(self, job: Job) -> None:
        for process in self.world.wanted(job.job_id).values():
            place = (process.placement.node_id, process.placement.incarnation)
            assert self.places.setdefault(process.process_id, place) == place, "a process id was used twice"
            if process.plan is not None and process.placement.kind is ProcessKind.PARTITION:
                placements = (*process.plan.partitions, *process.plan.standbys)
                named = [(placement.rank, placement.attempt, placement.node_id) for placement in placements]
                assert named.count((process.placement.rank, process.placement.attempt, process.placement.node_id)) == 1

    def _only_those_in_sync_take_over(self, job: Job) -> None:
        """Without a restore a partition is held on by who held it, or by a standby that was reported in sync since."""
        plan = job.plan
        if plan is None:
            return
        holding = [placement.process_id(job.job_id) for placement in plan.partitions]
        restored, before = self.held.get(job.job_id, (-1, []))
        if restored == plan.restore_generation:
            for own, former in zip(holding, before, strict=True):
                assert own == former or self.relied_on.get(own) == restored, f"{own} lost what {former} voted on"
        self.held[job.job_id] = (plan.restore_generation, holding)


def _check_standbys(job: Job) -> None:
    for placement in job.standbys:
        partition = job.placement(ProcessKind.PARTITION, placement.rank)
        assert partition is not None
        assert not placement.placed or placement.node_id != partition.node_id, "one death would take both"
        assert not placement.synced or placement.active
    assert {placement.rank for placement in job.standbys} in (set(), {0, 1})


def _check_plan(job: Job) -> None:
    plan = job.plan
    if plan is None:
        return
    assert plan.generation == job.generation
    assert plan.restore_generation <= job.generation
    assert (plan.restore is None) == (plan.resume_step == 0)
    if plan.restore is not None:
        assert plan.restore.step == plan.resume_step
        assert [part.partition for part in plan.restore.parts] == [0, 1]
    if counted_on(plan.trainers):
        _check_shards(job, plan.trainers)


def _check_shards(job: Job, trainers: tuple[Placement, ...]) -> None:
    dealt = sorted(
        shard for placement in trainers for first, count in placement.shards for shard in range(first, first + count)
    )
    assert dealt == list(range(job.num_shards))
    assert all(placement.active for placement in trainers if placement.shards)


def _check_rest(job: Job) -> None:
    assert job.reason
    if job.state.ended or job.state is JobState.QUEUED:
        assert job.placements == ()
        assert job.deadline_s is None
    if job.state is JobState.FAILED:
        assert job.error is not None


@pytest.mark.parametrize("seed", range(NUM_SEEDS), ids=lambda seed: f"seed_{seed}")
def test_anything_may_happen(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(NUM_ACTIONS):
        simulation.act()


def test_the_simulation_meets_what_it_is_for() -> None:
    wanted = {"TrainerLost", "PartitionLost", "RolledBack", "Recovered", "Restored", "Failed", "Stopped", "NodeLeftOut"}
    wanted |= {"StandbyLost", "StandbyInSync", "TookOver"}
    wanted |= {"TrainerMoved", "PartitionMoves", "Moved"}
    missing = set(wanted)
    for seed in range(400):
        simulation = Simulation(seed)
        for _ in range(NUM_ACTIONS):
            simulation.act()
        missing -= set(simulation.world.reasons())
        if not missing:
            return
    raise AssertionError(f"never met: {sorted(missing)}")


def test_reconcile_is_a_function() -> None:
    world = World()
    world.running()
    arguments = (world.job(), {}, {}, world.state.catalogues["job-aaaaaa"], world.now, world.limits)
    assert reconcile(*arguments) == reconcile(*arguments)
