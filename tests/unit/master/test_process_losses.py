"""Processes that the master hears and that cannot reach each other: who is done without, and who is given up."""

from __future__ import annotations

import re

import pytest

from psmaster.scheduling import process_losses
from tests.harness.master_world import PARTITION, World


@pytest.fixture
def world() -> World:
    """Two workers, three servers, two partitions: there is room for one of them elsewhere."""
    world = World()
    world.running()
    world.join("server-2")
    return world


def shards(world: World) -> list[tuple[tuple[int, int], ...]]:
    return [placement.shards for placement in world.job().trainers]


def homes(world: World) -> list[str]:
    return [placement.node_id for placement in world.job().partitions]


def test_a_trainer_that_is_cut_off_is_done_without_until_it_is_back(world: World) -> None:
    world.unreached("trainer-0", 1)
    assert shards(world) == [((0, 4),), ((4, 4),)], "others may be about to say the same"
    world.wait(process_losses.REPORT_GRACE_S)
    assert shards(world) == [(), ((0, 8),)]
    assert any(re.search("trainer-0 on worker-0.*partition-1", e.message) for e in world.events)
    assert re.search("1 worker;.*trainer-0.*partition-1", world.job().reason)
    assert world.job().generation == 2
    world.wait(world.limits.first_grace_s + 5)
    assert world.wanted()["trainer-0"].placement.attempt == 1, "another process would not reach it either"
    assert world.job().generation == 2, "what was said under the first plan holds: addresses are the same"
    world.unreached("trainer-0")
    assert shards(world) == [((0, 4),), ((4, 4),)]
    assert "TrainerBack" in world.reasons()


def test_a_partition_that_no_trainer_reaches_goes_elsewhere(world: World) -> None:
    world.unreached("trainer-0", 1)
    world.unreached("trainer-1", 1)
    world.wait(process_losses.REPORT_GRACE_S)
    assert homes(world) == ["server-0", "server-2"]
    assert "TrainerSuspect" not in world.reasons()
    (lost,) = [e.message for e in world.events if e.reason == "PartitionLost"]
    assert lost.startswith("partition-1 on server-1 is out of reach: trainer-0 cannot reach partition-1; ")
    world.report("partition-1", PARTITION)
    assert world.job().plan is not None and world.job().plan.restore_generation == 2
    world.wait(5.0)
    assert homes(world) == ["server-0", "server-2"], "what was said of the old place is void"
    assert shards(world) == [((0, 4),), ((4, 4),)]


def test_without_room_elsewhere_the_job_waits_and_says_so() -> None:
    world = World()
    world.running()
    world.unreached("trainer-0", 1)
    world.unreached("trainer-1", 1)
    world.wait(60.0)
    assert homes(world) == ["server-0", "server-1"]
    assert world.job().generation == 1
    assert world.job().reason.endswith("trainer-0 cannot reach partition-1; trainer-1 cannot reach partition-1")


def test_when_nobody_reaches_anybody_nobody_is_to_blame(world: World) -> None:
    for name in ("trainer-0", "trainer-1"):
        world.unreached(name, 0, 1)
    world.wait(60.0)
    assert homes(world) == ["server-0", "server-1"]
    assert shards(world) == [((0, 4),), ((4, 4),)], "there is nobody else"


def test_a_silent_trainers_word_does_not_count(world: World) -> None:
    world.suspect("trainer-1", "silent")
    world.unreached("trainer-0", 1)
    world.wait(process_losses.REPORT_GRACE_S)
    assert homes(world) == ["server-0", "server-2"]


def test_a_partition_that_does_not_reach_the_coordinator_goes_elsewhere(world: World) -> None:
    world.unreached("partition-1", 0)
    world.wait(process_losses.REPORT_GRACE_S)
    assert homes(world) == ["server-0", "server-2"]


def test_a_coordinator_that_no_partition_reaches_goes_elsewhere() -> None:
    world = World()
    world.cluster(2, servers=4)
    world.submit(servers={"partitions": 3})
    world.ready()
    world.snapshot(0)
    world.commit(1)
    for name in ("partition-1", "partition-2"):
        world.unreached(name, 0)
    world.wait(process_losses.REPORT_GRACE_S)
    assert homes(world) == ["server-3", "server-1", "server-2"]


def test_a_standby_in_sync_takes_over_from_a_partition_out_of_reach() -> None:
    world = World()
    world.cluster(2, servers=4)
    world.submit(durability={"tier": "replica"})
    world.ready()
    world.snapshot(0)
    world.commit(1)
    world.in_sync(0, 1)
    place = world.job().standby(1)
    assert place is not None
    for name in ("trainer-0", "trainer-1"):
        world.unreached(name, 1)
    world.wait(process_losses.REPORT_GRACE_S)
    assert homes(world)[1] == place.node_id
    assert world.job().plan is not None and world.job().plan.restore_generation == 1, "no step is repeated"


@pytest.mark.parametrize("lost", [(1,), (0, 1)])
def test_partitions_that_are_replaced_are_not_missed_where_they_were(lost: tuple[int, ...], world: World) -> None:
    for index in lost:
        world.exit(f"partition-{index}", signal=9)
    for name in ("trainer-0", "trainer-1"):
        world.unreached(name, *lost)
    world.wait(5.0)
    for index in lost:
        world.report(f"partition-{index}", PARTITION)
    world.wait(5.0)
    assert not {"TrainerSuspect", "TrainerBack"} & set(world.reasons())
    assert world.reasons().count("PartitionLost") == len(lost)


def test_a_restarted_master_hears_of_it_again(world: World) -> None:
    world.unreached("trainer-0", 1)
    world.wait(process_losses.REPORT_GRACE_S)
    held = [world.state.processes[f"job-aaaaaa/trainer-{rank}/1"] for rank in (0, 1)]
    world.restart()
    for process in held:
        world.rejoin(process.node_id, process)
    world.wait(process_losses.REPORT_GRACE_S)
    assert shards(world) == [(), ((0, 8),)]


def test_only_so_many_reports_are_told() -> None:
    reports = {f"trainer-{rank}": frozenset({2, 10}) for rank in range(6)}
    received = process_losses.describe_reports(reports)
    assert received.startswith("trainer-0 cannot reach partition-2, partition-10; ") and received.endswith("; ...")
    assert received.count("cannot") == 4
