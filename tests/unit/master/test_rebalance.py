"""Straggler relief: when shards move, when they do not, and that they come to rest."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psmaster.api import proto
from psmaster.control.transaction import Transaction
from psmaster.model.job import Event, Instant
from psmaster.model.process import with_measurement
from psmaster.scheduling import rebalance
from tests.harness.master_world import TRAINER, World

Speed = Callable[[], float]


class Shop:
    """A world whose trainers measure: each second every trainer with shards beats once and a step is committed."""

    def __init__(self, workers: int = 2, num_shards: int = 12) -> None:
        self.world = World()
        train = {"global_batch": num_shards, "microbatch": 1, "max_steps": 100_000}
        self.world.train(workers, train=train, workers={"max": workers})
        self.measured: dict[str, int] = {}

    def sizes(self) -> list[int]:
        return [sum(count for _, count in placement.shards) for placement in self.world.job().trainers]

    def moves(self, *reasons: str) -> list[Event]:
        return [event for event in self.world.events if event.reason in (reasons or ("ShardsMoved",))]

    def go_on(self, seconds: int, *speeds: Speed | float) -> None:
        """`speeds`: seconds a microbatch of trainer-0, trainer-1, ..."""
        for _ in range(seconds):
            for placement, speed in zip(self.world.job().trainers, speeds, strict=True):
                if placement.shards:
                    self.beat(
                        placement.node_id, placement.process_id("job-aaaaaa"), speed() if callable(speed) else speed
                    )
            self.world.wait(1.0)
            self.world.commit(self.world.job().step + 1)

    def beat(self, node_id: str, process_id: str, microbatch_s: float) -> None:
        self.measured[process_id] = self.measured.get(process_id, 0) + 2
        received = {process_id: (microbatch_s, self.measured[process_id])}
        self.world.take(lambda tx: tx.beat(node_id, self.world.lives[node_id], received))


def test_before_anything_is_measured_the_deal_is_even() -> None:
    shop = Shop()
    shop.world.wait(600)
    assert shop.sizes() == [6, 6]


def test_shards_move_from_a_trainer_at_half_the_speed_and_back_when_it_recovers() -> None:
    shop = Shop()
    shop.go_on(20, 0.1, 0.1)
    assert shop.sizes() == [6, 6]
    assert shop.moves() == []
    shop.go_on(30, 0.1, 0.2)
    assert shop.sizes() == [8, 4]
    assert len(shop.moves()) <= 2
    received = shop.moves()[-1]
    assert received.warning
    assert "trainer-1 on worker-1 takes 2.0 times as long" in received.message
    assert "it has 4 of 12 shards now" in received.message
    shop.go_on(60, 0.1, 0.1)
    assert shop.sizes() == [6, 6]
    assert shop.moves()[-1].message.startswith("no trainer is slow")
    assert not shop.moves()[-1].warning


def test_moving_shards_restores_nothing() -> None:
    shop = Shop()
    before = shop.world.job().plan
    shop.go_on(15, 0.1, 0.3)
    plan = shop.world.job().plan
    assert before is not None and plan is not None
    assert plan.generation > before.generation
    assert plan.restore_generation == before.restore_generation
    assert "RolledBack" not in shop.world.reasons()
    assert [placement.process_id("j") for placement in plan.trainers] == [
        placement.process_id("j") for placement in before.trainers
    ]


@pytest.mark.parametrize("slow", [0.105, 0.11])
def test_what_gains_little_is_left(slow: float) -> None:
    shop = Shop()
    shop.go_on(300, 0.1, slow)
    assert shop.sizes() == [6, 6]
    assert shop.moves() == []


def test_a_job_of_short_steps_is_not_planned_anew_in_every_one() -> None:
    shop = Shop()
    shop.go_on(10, 0.001, 0.001)
    moved_at = []
    for second in range(120):
        moves = len(shop.moves())
        fast = second % 2
        shop.go_on(1, 0.001 + 0.004 * fast, 0.001 + 0.004 * (1 - fast))
        if len(shop.moves()) > moves:
            moved_at.append(second)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moved_at)]
    assert all(gap >= rebalance.WAIT_S for gap in gaps)
    assert gaps == sorted(gaps), "each is waited for longer than the one before"


class Bench:
    """The decision alone, with plans made as the master makes them: hours pass in a moment."""

    def __init__(self, workers: int, num_shards: int) -> None:
        shop = Shop(workers, num_shards)
        self.job, self.processes, self.now = shop.world.job(), dict(shop.world.state.processes), shop.world.now
        self.num_moves = 0

    @property
    def sizes(self) -> dict[int, int]:
        return {placement.rank: sum(count for _, count in placement.shards) for placement in self.job.trainers}

    def go_on(self, seconds: int, *speeds: Speed) -> None:
        for _ in range(seconds):
            self.now = Instant(mono_s=self.now.mono_s + 1, unix_s=self.now.unix_s + 1)
            for placement, speed in zip(self.job.trainers, speeds, strict=True):
                process = self.processes[placement.process_id(self.job.job_id)]
                if placement.shards:
                    measured = with_measurement(process.speed, speed(), process.speed.microbatches + 1, self.now.mono_s)
                    self.processes[process.process_id] = replace(process, speed=measured)
            self.job = replace(self.job, step=self.job.step + 1)
            move = rebalance.due(self.job, self.job.trainers, self.processes, self.now)
            if move is not None:
                self.assign(move)

    def assign(self, move: rebalance.Move) -> None:
        self.num_moves += 1
        speeds = rebalance.measured_speeds(self.job.trainers, self.job.job_id, self.processes)
        runs = rebalance.assign_shards(self.job.num_shards, speeds, move.probe)
        assignment = replace(move.assignment, since_s=self.now.mono_s, step=self.job.step, probe=move.probe)
        placements = tuple(replace(placement, shards=runs[placement.rank]) for placement in self.job.trainers)
        self.job = replace(self.job, trainers=placements, assignment=assignment)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), workers=st.integers(2, 4), num_shards=st.sampled_from([7, 12, 32, 64]))
def test_noise_alone_moves_next_to_nothing(seed: int, workers: int, num_shards: int) -> None:
    """Half an hour of constant speeds, measured with +-15 %. However long it goes on, moves get rarer."""
    noise = random.Random(seed)
    bench = Bench(workers, num_shards)
    bench.go_on(1800, *[lambda: 0.1 * (1 + noise.uniform(-0.15, 0.15))] * workers)
    assert bench.num_moves <= 4


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), ratio=st.floats(1.5, 4.0), num_shards=st.sampled_from([12, 32, 64]))
def test_a_straggler_is_relieved_in_few_moves_under_noise(seed: int, ratio: float, num_shards: int) -> None:
    noise = random.Random(seed)
    true = {0: 0.1, 1: 0.1 * ratio}

    def noisy(speed: float) -> Speed:
        return lambda: speed * (1 + noise.uniform(-0.15, 0.15))

    bench = Bench(2, num_shards)
    bench.go_on(60, noisy(0.1), noisy(0.1))
    even_s = max(size * true[rank] for rank, size in bench.sizes.items())
    before = bench.num_moves
    bench.go_on(300, *(noisy(true[rank]) for rank in true))
    assert bench.num_moves - before <= 3
    reached_s = max(size * true[rank] for rank, size in bench.sizes.items())
    assert reached_s <= 1.2 * rebalance.least_makespan_s(num_shards, list(true.values()))
    assert reached_s < even_s


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_two_trainers_that_share_a_core_do_not_thrash(seed: int) -> None:
    """Where they slow each other down, who has less is done earlier, and the other's rest goes at full speed."""
    noise = random.Random(seed)
    bench = Bench(2, 12)

    def measured(rank: int) -> Speed:
        def median_s() -> float:
            mine, other = bench.sizes[rank], bench.sizes[1 - rank]
            took = [0.2] * min(mine, other) + [0.1] * max(0, mine - other)
            return statistics.median(took) * (1 + noise.uniform(-0.1, 0.1))

        return median_s

    bench.go_on(1800, measured(0), measured(1))
    assert bench.num_moves <= 3


def test_who_is_too_slow_for_a_shard_stands_by_and_is_tried_again() -> None:
    shop = Shop(3, num_shards=4)
    shop.go_on(40, 0.1, 5.0, 0.1)
    assert shop.sizes() == [2, 0, 2]
    assert shop.world.job().trainers[1].active
    shop.go_on(40, 0.1, 5.0, 0.1)
    tried = shop.moves("ShardTried")
    assert len(tried) == 1
    assert "trainer-1 on worker-1 was too slow for a shard" in tried[0].message
    assert shop.sizes() == [2, 0, 2], "it was as slow as before"
    shop.go_on(300, 0.1, 5.0, 0.1)
    assert len(shop.moves("ShardTried")) <= 4, "tried less and less often"
    shop.go_on(600, 0.1, 0.1, 0.1)
    assert sorted(shop.sizes()) == [1, 1, 2]


def test_a_newcomer_is_taken_for_the_median() -> None:
    shop = Shop(2)
    shop.go_on(30, 0.1, 0.2)
    assert shop.sizes() == [8, 4]
    shop.world.exit("trainer-1", signal=9)
    assert shop.sizes() == [12, 0]
    shop.world.report("trainer-1", TRAINER)
    assert shop.sizes() == [6, 6]


def test_a_lost_trainers_shards_go_to_the_others_by_their_speed() -> None:
    shop = Shop(3)
    shop.go_on(30, 0.1, 0.2, 0.1)
    shop.world.exit("trainer-0", signal=9)
    assert shop.sizes() == [0, 4, 8]


def test_a_restarted_master_measures_anew_and_leaves_the_plan_meanwhile() -> None:
    shop = Shop(2)
    shop.go_on(30, 0.1, 0.2)
    generation = shop.world.job().generation
    shop.world.restart()
    for index in range(2):
        shop.world.rejoin(f"worker-{index}")
        shop.world.rejoin(f"server-{index}")
    shop.world.wait(60)
    assert shop.world.job().generation == generation
    assert shop.sizes() == [8, 4]
    shop.go_on(60, 0.1, 0.1)
    assert shop.sizes() == [6, 6]


def test_speeds_of_what_runs_no_more_are_not_kept() -> None:
    shop = Shop(2)
    shop.go_on(3, 0.1, 0.1)
    shop.world.exit("trainer-1", signal=9)
    shop.world.take(lambda tx: tx.beat("worker-1", shop.world.lives["worker-1"], {"job-aaaaaa/trainer-1/1": (1, 99)}))
    assert "job-aaaaaa/trainer-1/1" not in shop.world.state.processes
    shop.world.take(lambda tx: tx.beat("worker-0", shop.world.lives["worker-0"], {"nonsense": (1.0, 9)}))
    assert "nonsense" not in shop.world.state.processes


def test_people_see_how_fast_each_computes() -> None:
    shop = Shop(2)
    shop.go_on(3, 0.1, 0.3)
    world = shop.world
    message = proto.job(world.job(), (), world.now, full=True, processes=world.state.processes)
    assert [placement.microbatch_s for placement in message.plan.trainers] == pytest.approx([0.1, 0.3])
    speeds = rebalance.measured_speeds(world.job().trainers, "job-aaaaaa", world.state.processes)
    assert rebalance.straggler_of(speeds) == (1, pytest.approx(3.0))


def test_a_beat_with_speeds_is_still_a_beat() -> None:
    world = World()
    world.running()
    tx = Transaction(world.state, world.now, world.limits)
    tx.beat("worker-0", world.lives["worker-0"], {"job-aaaaaa/trainer-0/1": (0.1, 1)})
    changes = tx.finish()
    assert changes.state.jobs == world.state.jobs, "what beats say is not stored"
    assert changes.state.processes["job-aaaaaa/trainer-0/1"].speed.microbatch_s == 0.1
