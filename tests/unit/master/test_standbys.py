"""Standbys as the master sees them: where they go, whom it believes, who takes over, and what plans say of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psmaster.api import proto
from psmaster.model.job import JobState
from psmaster.model.plan import Plan
from psmaster.model.process import Exit, Process
from psmaster.model.reports import StandbyState
from tests.harness.master_world import PARTITION, TRAINER, World, failure

REPLICA = {"durability": {"tier": "replica"}}


def roomy(servers: int) -> World:
    """Two workers, and servers with more slots than there are partitions."""
    world = World()
    world.cluster(2, 0)
    for index in range(servers):
        world.join(f"server-{index}", slots=4)
    return world


@pytest.fixture
def world() -> World:
    """Two partitions with standbys in sync, at step 5."""
    world = roomy(3)
    world.submit(**REPLICA)
    world.ready()
    world.snapshot(0)
    world.in_sync(0, 1)
    world.commit(1, 2, 3, 4, 5)
    return world


def plan_of(world: World) -> Plan:
    plan = world.job().plan
    assert plan is not None
    return plan


def nodes_of(world: World) -> dict[str, str]:
    return {name: process.placement.node_id for name, process in world.wanted().items()}


def condition(world: World) -> tuple[bool, str]:
    return next((c.status, c.reason) for c in world.job().conditions if c.type == "Replicated")


def test_with_tier_snapshot_there_are_none() -> None:
    world = World()
    world.running()
    assert world.job().standbys == ()
    assert "Replicated" not in {c.type for c in world.job().conditions}


def test_each_partition_has_one_on_another_server() -> None:
    world = roomy(2)
    world.submit(**REPLICA)
    nodes = nodes_of(world)
    assert {nodes["partition-0"], nodes["standby-0"]} == {nodes["partition-1"], nodes["standby-1"]}
    assert nodes["partition-0"] != nodes["standby-0"]


def test_the_first_plan_waits_for_none_and_the_next_names_them() -> None:
    world = roomy(3)
    world.submit(**REPLICA)
    for name in ("trainer-0", "trainer-1", "partition-0", "partition-1"):
        world.report(name, TRAINER if name.startswith("trainer") else PARTITION)
    assert plan_of(world).standbys == ()
    assert world.wanted()["standby-0"].plan is None
    world.report("standby-0", PARTITION)
    assert [(placement.rank, placement.attempt) for placement in plan_of(world).standbys] == [(0, 2)]
    assert (plan_of(world).generation, plan_of(world).restore_generation) == (2, 1)
    assert world.wanted()["standby-0"].plan == plan_of(world)
    message = proto.plan(world.job(), plan_of(world))
    assert message.partitions[0].standby.attempt == 2
    assert list(message.partitions[0].standby.addresses) == list(PARTITION.addresses)
    assert not message.partitions[1].HasField("standby")


def test_a_standby_in_sync_takes_over_without_a_restore(world: World) -> None:
    standby = world.wanted()["standby-1"]
    world.exit("partition-1", signal=9)
    plan = plan_of(world)
    assert (plan.restore_generation, plan.moved_generation, plan.coordinator_generation) == (1, plan.generation, 0)
    assert world.wanted()["partition-1"].process_id == standby.process_id
    assert world.wanted()["partition-1"].plan == plan
    assert world.job().step == 5
    assert {"TookOver", "PartitionLost"} <= set(world.reasons())
    assert "RolledBack" not in world.reasons()
    assert world.last is not None and world.last.cuts == {}
    world.commit(6)
    assert "Recovered" in world.reasons()


def test_the_coordinator_is_taken_over_and_its_reports_count(world: World) -> None:
    world.exit("partition-0", signal=9)
    plan = plan_of(world)
    assert plan.coordinator_generation == plan.moved_generation == plan.generation
    world.commit(4, 5, 6)
    assert world.job().step == 6
    assert [line.step for _, line in world.last.lines] == [6] if world.last else False


def test_a_new_standby_is_placed_after_a_takeover(world: World) -> None:
    world.exit("partition-1", signal=9)
    assert world.wanted()["standby-1"].placement.attempt == 3
    assert nodes_of(world)["standby-1"] != nodes_of(world)["partition-1"]
    assert condition(world) == (False, "CatchingUp")
    world.report("standby-1", PARTITION)
    world.in_sync(1)
    assert condition(world) == (True, "InSync")
    world.exit("partition-1", signal=9)
    assert "RolledBack" not in world.reasons()


def test_without_its_word_no_standby_takes_over_without_a_restore(world: World) -> None:
    world.exit("standby-1", signal=9)
    world.report("standby-1", PARTITION)
    world.exit("partition-1", signal=9)
    plan = plan_of(world)
    assert plan.restore_generation == plan.generation
    assert "RolledBack" in world.reasons()


def test_a_standby_not_in_sync_is_at_least_a_process_that_is_there(world: World) -> None:
    world.exit("standby-1", signal=9)
    world.report("standby-1", PARTITION)
    there = world.wanted()["standby-1"].process_id
    world.exit("partition-1", signal=9)
    assert world.wanted()["partition-1"].process_id == there
    assert "Placed" in world.reasons()


def test_partition_and_standby_lost_at_once_go_back(world: World) -> None:
    nodes = nodes_of(world)
    lives = {nodes["partition-1"], nodes["standby-1"]}
    world.wait(5.0, silent=frozenset(lives))
    for node_id in lives:
        world.join(node_id, life="2")
    world.ready()
    assert plan_of(world).restore_generation > 1
    assert "RolledBack" in world.reasons()


def test_a_standby_lost_after_it_took_over_and_before_it_spoke_goes_back(world: World) -> None:
    world.exit("partition-1", signal=9)
    assert "RolledBack" not in world.reasons()
    world.exit("partition-1", signal=9)
    world.ready()
    assert plan_of(world).restore_generation > 1
    assert "RolledBack" in world.reasons()


def test_all_go_back_when_one_of_two_lost_partitions_has_no_standby(world: World) -> None:
    world.exit("standby-0", signal=9)
    taking_over = world.wanted()["standby-1"].process_id
    dead = [world.wanted()[name] for name in ("partition-0", "partition-1")]
    world.take(*(lambda tx, p=p: tx.exited(p.placement.node_id, p.process_id, Exit(signal=9)) for p in dead))  # type: ignore[misc]
    world.ready()
    assert plan_of(world).restore_generation > 1
    assert world.wanted()["partition-1"].process_id == taking_over
    assert all(not placement.synced for placement in world.job().standbys)


def test_a_lost_standby_costs_no_step(world: World) -> None:
    before = plan_of(world)
    world.exit("standby-0", signal=9)
    plan = plan_of(world)
    assert (plan.generation, plan.restore_generation) == (before.generation + 1, before.restore_generation)
    assert plan.moved_generation == 0
    assert [placement.rank for placement in plan.standbys] == [1]
    assert "PartitionLost" not in world.reasons()
    assert world.job().recovery is None


def test_a_standby_that_does_not_answer_is_given_up(world: World) -> None:
    old = world.wanted()["standby-0"].process_id
    world.in_sync(0, in_sync=False)
    assert [placement.rank for placement in plan_of(world).standbys] == [1]
    assert world.wanted().get("standby-0") is None or world.wanted()["standby-0"].process_id != old


def test_stale_words_about_standbys_change_nothing(world: World) -> None:
    world.exit("standby-0", signal=9)
    world.report("standby-0", PARTITION)
    generation = world.job().generation
    attempt = world.wanted()["standby-0"].placement.attempt
    before = world.job().standbys
    for reported in (
        StandbyState(generation=generation, attempt=attempt - 1, in_sync=True),
        StandbyState(generation=0, attempt=attempt, in_sync=True),
        StandbyState(generation=generation, attempt=attempt - 1, in_sync=False),
    ):
        world.report("partition-0", reported)
    assert world.job().standbys == before
    process = world.wanted()["standby-0"]
    world.report_as(
        process.placement.node_id,
        process.process_id,
        StandbyState(generation=generation, attempt=attempt, in_sync=True),
    )
    assert world.job().standbys == before, "a standby does not speak for itself"


def test_a_restore_voids_what_was_in_sync(world: World) -> None:
    world.exit("standby-1", signal=9)
    world.exit("partition-1", signal=9)
    world.ready()
    assert [placement.synced for placement in world.job().standbys] == [False, False]
    reported = StandbyState(generation=plan_of(world).restore_generation - 1, attempt=2, in_sync=True)
    world.report("partition-0", reported)
    assert [placement.synced for placement in world.job().standbys] == [False, False], "from before the restore"


def test_one_server_alone_says_so_and_a_second_one_helps() -> None:
    world = World()
    world.cluster(1, 0)
    world.join("server-0", slots=4)
    world.submit(**REPLICA)
    world.ready()
    world.commit(1)
    assert world.job().state is JobState.RUNNING
    assert "without standby for partition-0, partition-1" in world.job().reason
    assert condition(world) == (False, "NoStandby")
    world.join("server-1", slots=4)
    assert nodes_of(world)["standby-0"] == nodes_of(world)["standby-1"] == "server-1"
    world.ready()
    world.in_sync(0, 1)
    assert condition(world) == (True, "InSync")
    assert "standby" not in world.job().reason


def test_a_standby_makes_room_for_a_partition_that_has_none() -> None:
    world = World()
    world.cluster(2, 3)
    world.submit(**REPLICA)
    world.ready()
    world.commit(1)
    alone = next(rank for rank in (0, 1) if not world.wanted().get(f"standby-{rank}"))
    with_standby = 1 - alone
    lost = nodes_of(world)[f"partition-{alone}"]
    space = nodes_of(world)[f"standby-{with_standby}"]
    world.wait(5.0, silent=frozenset({lost}))
    assert nodes_of(world)[f"partition-{alone}"] == space
    assert f"standby-{with_standby}" not in world.wanted()


def test_a_standby_of_another_numerics_class_is_left_out(world: World) -> None:
    world.exit("standby-0", signal=9)
    where = nodes_of(world)["standby-0"]
    world.report("standby-0", replace(PARTITION, numerics_class="X" * 16))
    assert where in {node_id for node_id, _, _ in world.job().excluded}
    assert world.job().state is JobState.RUNNING


def test_a_failing_standby_never_fails_the_job(world: World) -> None:
    for _ in range(20):
        if "standby-0" in world.wanted():
            world.report("standby-0", failure("PS-2001", "it cannot"))
    assert world.job().state is JobState.RUNNING
    assert "TookOver" not in world.reasons()


def test_a_master_restart_keeps_what_it_was_told(world: World) -> None:
    wanted = world.wanted()
    world.restart()
    assert world.wanted() == wanted
    for node_id in list(world.lives):
        facts = {"trainer": TRAINER} if node_id.startswith("worker") else {"partition": PARTITION}
        running = [p for p in wanted.values() if p.placement.node_id == node_id]
        received = tuple(Process(process_id=p.process_id, node_id=node_id, **facts) for p in running)  # type: ignore[arg-type]
        world.rejoin(node_id, *received)
    world.exit("partition-1", signal=9)
    assert "TookOver" in world.reasons()
    assert "RolledBack" not in world.reasons()


def test_the_end_releases_standbys(world: World) -> None:
    world.snapshot(100)
    world.finish()
    assert world.job().state is JobState.SUCCEEDED
    assert world.wanted() == {}


def test_from_a_draining_server_its_partition_goes_to_the_standby_without_a_rest(world: World) -> None:
    before = nodes_of(world)
    node, heir = before["partition-0"], world.wanted()["standby-0"].process_id
    moves = [name for name, where in before.items() if name.startswith("partition") and where == node]
    world.take(lambda tx: tx.drain(node))
    plan = plan_of(world)
    assert world.wanted()["partition-0"].process_id == heir
    assert (plan.restore_generation, plan.save) == (1, False), "nobody goes back, nobody rests"
    assert plan.moved_generation == plan.generation
    assert world.reasons().count("TookOver") == len(moves)
    assert node not in nodes_of(world).values(), "its standbys went, too"
    assert nodes_of(world)["standby-0"] != nodes_of(world)["partition-0"]


def test_from_a_draining_server_a_standby_is_ended_and_another_one_begins(world: World) -> None:
    before = nodes_of(world)
    node = before["standby-0"]
    held = {name: world.wanted()[name].process_id for name in ("partition-0", "partition-1")}
    stays = [name for name in held if before[name] != node]
    world.take(lambda tx: tx.drain(node))
    assert all(world.wanted()[name].process_id == held[name] for name in stays)
    assert node not in nodes_of(world).values()
    assert plan_of(world).restore_generation == 1
