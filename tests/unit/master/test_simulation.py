"""A seeded cluster in which anything may happen in any order, with the invariants checked after every turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from psmaster.jobs import Job, JobState
from psmaster.reconcile import reconcile
from psmaster.seats import Kind, Seat
from psmaster.turn import Turn

from tests.unit.master.world import PARTITION, TRAINER, World

JOBS = ("one-aaaaaa", "two-aaaaaa")
NODES = ("worker-0", "worker-1", "worker-2", "server-0", "server-1")

jobs = st.sampled_from(JOBS)
nodes = st.sampled_from(NODES)
seats = st.sampled_from(("trainer-0", "trainer-1", "trainer-2", "partition-0", "partition-1"))


class ClusterMachine(RuleBasedStateMachine):
    """Agents, jobs and a master that may be restarted at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.lives = 0
        self.generations: dict[str, int] = {}
        self.process_ids: dict[str, tuple[str, str]] = {}  # every process id ever: the node life it was placed in

    @initialize()
    def begin(self) -> None:
        self.world.submit(JOBS[0], name="one")
        self.world.submit(JOBS[1], name="two", workers={"min": 2}, train={"numerics": "strict"})
        for node_id in NODES:
            self.world.join(node_id, slots=2)

    @rule(node_id=nodes)
    def restart_agent(self, node_id: str) -> None:
        self.lives += 1
        self.world.join(node_id, slots=2, life=f"again{self.lives}")

    @rule(node_id=nodes)
    def stream_breaks(self, node_id: str) -> None:
        self.world.take(lambda turn: turn.detach(node_id, self.world.lives[node_id]))

    @rule(node_id=nodes)
    def stream_is_back(self, node_id: str) -> None:
        facts = tuple(p for p in self.world.state.processes.values() if p.node_id == node_id)
        self.world.rejoin(node_id, *facts, slots=2)

    @rule(seconds=st.sampled_from((0.5, 1.0, 4.0)), silent=st.frozensets(nodes, max_size=2))
    def time_passes(self, seconds: float, silent: frozenset[str]) -> None:
        self.world.wait(seconds, silent=silent)

    @rule()
    def master_restarts(self) -> None:
        facts = self.world.state.processes
        attended = [node_id for node_id, node in self.world.state.nodes.items() if node.attended]
        self.world.restart()
        for node_id in attended:
            self.world.rejoin(node_id, *(p for p in facts.values() if p.node_id == node_id), slots=2)

    @rule(job_id=jobs, seat=seats, numerics=st.sampled_from("NNNM"))
    def process_is_ready(self, job_id: str, seat: str, numerics: str) -> None:
        process = self.world.wanted(job_id).get(seat)
        assume(process is not None and process.process_id not in self.world.state.processes)
        facts: Any = replace(TRAINER, numerics_class=numerics * 16) if seat.startswith("trainer") else PARTITION
        self.world.report(seat, facts, job_id)

    @rule(job_id=jobs)
    def all_are_ready(self, job_id: str) -> None:
        self.world.ready(job_id)

    @rule(job_id=jobs, seat=seats, how=st.sampled_from(({"signal": 9}, {"exit_code": 1}, {"out_of_memory": True})))
    def process_dies(self, job_id: str, seat: str, how: dict[str, Any]) -> None:
        assume(seat in self.world.wanted(job_id))
        self.world.exit(seat, job_id, **how)

    @rule(job_id=jobs, count=st.integers(1, 5), behind=st.integers(0, 2))
    def steps_are_committed(self, job_id: str, count: int, behind: int) -> None:
        job = self.world.job(job_id)
        assume(job.plan is not None and "partition-0" in self.world.wanted(job_id))
        generation = max(0, job.generation - behind)
        self.world.commit(*range(job.step + 1, job.step + 1 + count), job_id=job_id, generation=generation)

    @rule(job_id=jobs, index=st.integers(0, 1), behind=st.integers(0, 2))
    def part_is_durable(self, job_id: str, index: int, behind: int) -> None:
        job = self.world.job(job_id)
        assume(f"partition-{index}" in self.world.wanted(job_id))
        part = self.world.part(job.step // 10 * 10, index, job_id, max(0, job.generation - behind))
        self.world.report(f"partition-{index}", part, job_id)

    @rule(job_id=jobs, stopped=st.booleans())
    def lead_finishes(self, job_id: str, stopped: bool) -> None:
        job = self.world.job(job_id)
        assume(job.plan is not None and "partition-0" in self.world.wanted(job_id))
        self.world.finish(job.step, stopped=stopped, job_id=job_id)

    @rule(job_id=jobs)
    def stop(self, job_id: str) -> None:
        assume(self.world.job(job_id).state in (JobState.QUEUED, JobState.STARTING, JobState.RUNNING))
        self.world.take(lambda turn: turn.stop(job_id))

    @rule(job_id=jobs)
    def resume(self, job_id: str) -> None:
        assume(self.world.job(job_id).state in (JobState.STOPPED, JobState.FAILED))
        self.world.take(lambda turn: turn.resume(job_id))

    # what must always hold

    @invariant()
    def settling_again_changes_nothing(self) -> None:
        turn = Turn(self.world.state, self.world.now, self.world.limits)
        turn.tick()
        changes = turn.finish()
        assert changes.state.jobs == self.world.state.jobs
        assert changes.state.catalogues == self.world.state.catalogues
        assert changes.events == ()
        assert changes.cuts == {}

    @invariant()
    def generations_only_rise(self) -> None:
        for job_id, job in self.world.state.jobs.items():
            assert job.generation >= self.generations.get(job_id, 0)
            self.generations[job_id] = job.generation
            if job.plan is not None:
                assert job.plan.generation == job.generation
                assert job.plan.restore_generation <= job.generation

    @invariant()
    def no_process_id_is_used_twice(self) -> None:
        for job_id in JOBS:
            for process in self.world.wanted(job_id).values() if job_id in self.world.state.jobs else ():
                place = (process.seat.node_id, process.seat.incarnation)
                assert self.process_ids.setdefault(process.process_id, place) == place

    @invariant()
    def slots_are_not_oversold(self) -> None:
        held: dict[str, int] = {}
        for job in self.world.state.jobs.values():
            for seat in job.seats:
                if seat.placed:
                    held[seat.node_id] = held.get(seat.node_id, 0) + 1
        assert all(count <= 2 for count in held.values())

    @invariant()
    def a_plan_that_runs_is_whole(self) -> None:
        for job in self.world.state.jobs.values():
            if job.plan is not None and job.plan.active:
                _check_shards(job, job.plan.trainers)

    @invariant()
    def ended_jobs_hold_nothing(self) -> None:
        for job in self.world.state.jobs.values():
            if job.state.ended or job.state is JobState.QUEUED:
                assert job.seats == ()
            assert job.reason

    @invariant()
    def no_process_meets_a_plan_that_does_not_name_it(self) -> None:
        for job_id in self.world.state.jobs:
            for process in self.world.wanted(job_id).values():
                if process.plan is not None and process.seat.kind is Kind.PARTITION:
                    named = process.plan.partitions[process.seat.rank]
                    assert (named.attempt, named.node_id) == (process.seat.attempt, process.seat.node_id)

    @invariant()
    def a_restore_point_is_complete(self) -> None:
        for job in self.world.state.jobs.values():
            if job.plan is not None and job.plan.restore is not None:
                assert job.plan.restore.step == job.plan.resume_step > 0
                assert [part.partition for part in job.plan.restore.parts] == [0, 1]

    @invariant()
    def what_is_stored_is_what_is_known(self) -> None:
        for job in self.world.store.jobs():
            known = self.world.state.jobs[job.job_id]
            assert job == replace(known, deadline_s=None, window=(), recovery=None)
            catalogue = self.world.state.catalogues[job.job_id]
            assert {(part.step, part.partition): part for part in self.world.store.parts(job.job_id)} == dict(
                catalogue.parts
            )


def _check_shards(job: Job, trainers: tuple[Seat, ...]) -> None:
    dealt = sorted(shard for seat in trainers for first, count in seat.shards for shard in range(first, first + count))
    assert dealt == list(range(job.num_shards))
    assert all(seat.active for seat in trainers if seat.shards)


TestCluster = ClusterMachine.TestCase
TestCluster.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def test_reconcile_is_a_function() -> None:
    world = World()
    world.running()
    arguments = (world.job(), {}, {}, world.state.catalogues["job-aaaaaa"], world.now, world.limits)
    assert reconcile(*arguments) == reconcile(*arguments)
