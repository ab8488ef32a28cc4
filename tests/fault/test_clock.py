"""A wall clock that jumps by an hour either way: no process is suspected, nothing is lost, speeds stay plausible."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psmaster.model.membership import Health, health
from psmaster.model.reports import rates
from tests.harness.master_world import World

HOUR_S = 3600.0


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_suspicion_is_of_the_monotonic_clock(jump_s: float) -> None:
    world = World()
    world.running()
    before, count = world.job(), len(world.events)
    world.now = replace(world.now, unix_s=world.now.unix_s + jump_s)
    world.wait(10)
    assert world.job().generation == before.generation
    assert world.events[count:] == []
    now_s, suspicion_s = world.now.mono_s, world.limits.suspicion_s
    assert {health(node, now_s, suspicion_s) for node in world.state.nodes.values()} == {Health.READY}
    world.commit(6, 7, 8)
    assert world.job().step == 8
    assert rates(world.job(), world.now).steps_per_s >= 0
    world.wait(4, silent=frozenset({"worker-0"}))  # and who is dead is found as soon as ever
    assert "TrainerLost" in [event.reason for event in world.events[count:]]


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_a_node_that_starts_again_after_a_jump_takes_its_place_at_once(jump_s: float) -> None:
    """The newer of two incarnations is the one that the master learned of later, not the one with the later clock."""
    world = World()
    world.running()
    world.now = replace(world.now, unix_s=world.now.unix_s + jump_s)
    world.join("worker-0", life="2")
    assert world.state.nodes["worker-0"].incarnation == "worker-0:2"
    assert world.wanted()["trainer-0"].placement.node_id == "worker-0"
