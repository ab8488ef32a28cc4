"""Membership."""

from __future__ import annotations

import pytest

from pscluster.errors import StateError
from psmaster.model import membership
from psmaster.model.job import Instant, JobState
from psmaster.model.membership import Health, Node, Role
from tests.harness.master_world import World

SUSPICION_S = 3.0


def at(seconds: float) -> Instant:
    return Instant(mono_s=seconds, unix_s=1_000 + seconds)


def node(life: str = "a") -> Node:
    return Node(node_id="worker-0", role=Role.WORKER, incarnation=life, slots=1)


def attended(life: str = "a", when: float = 0.0) -> membership.Nodes:
    nodes = membership.register({}, node(life), at(when), SUSPICION_S)
    return membership.open_stream(nodes, "worker-0", life, at(when))


def health(nodes: membership.Nodes, when: float) -> Health:
    return membership.health(nodes["worker-0"], when, SUSPICION_S)


def test_a_node_is_ready_once_it_attends_and_dead_after_the_suspicion() -> None:
    nodes = membership.register({}, node(), at(0), SUSPICION_S)
    assert health(nodes, 0) is Health.SUSPECT
    nodes = membership.open_stream(nodes, "worker-0", "a", at(0))
    assert health(nodes, 1) is Health.READY
    assert health(nodes, 2) is Health.SUSPECT
    assert health(nodes, 3.1) is Health.DEAD
    assert health(membership.beat(nodes, "worker-0", "a", at(3)), 3.1) is Health.READY


def test_a_broken_stream_is_suspect_at_once_and_dead_only_later() -> None:
    nodes = membership.detach(attended(), "worker-0", "a")
    assert health(nodes, 0.1) is Health.SUSPECT
    assert health(nodes, 3.1) is Health.DEAD
    assert health(membership.open_stream(nodes, "worker-0", "a", at(1)), 1) is Health.READY


def test_a_newer_life_replaces_an_older_one_and_not_the_reverse() -> None:
    nodes = membership.register(attended("a"), node("b"), at(1), SUSPICION_S)
    assert nodes["worker-0"].incarnation == "b"
    assert not nodes["worker-0"].connected
    with pytest.raises(StateError):
        membership.register(nodes, node("a"), at(2), SUSPICION_S)
    again = membership.register(nodes, node("b"), at(2), SUSPICION_S)
    with pytest.raises(StateError):
        membership.register(again, node("a"), at(3), SUSPICION_S)
    with pytest.raises(StateError):
        membership.open_stream(nodes, "worker-0", "a", at(2))


def test_a_displaced_life_is_taken_back_when_the_one_in_its_place_is_dead() -> None:
    nodes = membership.register(attended("a"), node("b"), at(1), SUSPICION_S)
    later = membership.register(nodes, node("a"), at(5), SUSPICION_S)
    assert later["worker-0"].incarnation == "a"
    with pytest.raises(StateError):
        membership.register(later, node("b"), at(6), SUSPICION_S)


def test_no_more_lives_are_remembered_than_can_still_come_back() -> None:
    nodes = attended("0")
    for life in range(1, 50):
        nodes = membership.register(nodes, node(str(life)), at(life), SUSPICION_S)
    assert nodes["worker-0"].former == tuple(str(life) for life in range(49 - membership.FORMER, 49))


def test_what_another_life_says_changes_nothing() -> None:
    nodes = attended("b")
    assert membership.beat(nodes, "worker-0", "a", at(9)) == nodes
    assert membership.detach(nodes, "worker-0", "a") == nodes
    assert membership.beat(nodes, "worker-7", "a", at(9)) == nodes


def test_registering_again_keeps_the_stream() -> None:
    nodes = membership.register(attended("a"), node("a"), at(1), SUSPICION_S)
    assert nodes["worker-0"].connected


def test_the_long_dead_are_forgotten() -> None:
    nodes = attended()
    assert membership.forget(nodes, at(100)) == nodes
    assert membership.forget(nodes, at(4_000)) == {}


def test_who_said_goodbye_is_forgotten_at_once_and_only_in_that_life() -> None:
    nodes = attended("b")
    assert membership.leave(nodes, "worker-0", "a") == nodes
    left = membership.leave(nodes, "worker-0", "b")
    assert left == {}
    assert membership.leave(left, "worker-0", "b") == {}
    assert membership.beat(left, "worker-0", "b", at(1)) == {}
    assert membership.detach(left, "worker-0", "b") == {}


def test_a_job_goes_on_without_a_node_that_said_goodbye() -> None:
    world = World()
    world.running()
    placement = next(placement for placement in world.job().trainers if placement.node_id == "worker-1")
    world.exit(placement.name, expected=True)
    world.take(lambda tx: tx.detach("worker-1", world.lives["worker-1"], for_good=True))
    del world.lives["worker-1"]
    world.wait(10)
    assert list(world.state.nodes) == ["worker-0", "server-0", "server-1"]
    assert world.job().state is JobState.RUNNING
    assert [placement.node_id for placement in world.job().trainers if placement.active] == ["worker-0"]
    world.join("worker-1", life="2")
    world.ready()
    assert [placement.node_id for placement in world.job().trainers if placement.active] == ["worker-0", "worker-1"]


def test_silence_that_nobody_could_hear_does_not_count() -> None:
    nodes = membership.shift_last_seen(attended(), 10)
    assert health(nodes, 11) is Health.READY
    assert health(nodes, 13.1) is Health.DEAD


def test_a_restarted_master_evicts_nobody_for_one_suspicion_period() -> None:
    world = World()
    world.running()
    world.wait(1)
    world.restart()
    lives = dict(world.lives)
    world.lives.clear()
    world.wait(2.9)
    assert "TrainerLost" not in world.reasons()
    assert all(placement.active for placement in world.job().placements)
    world.wait(0.5)
    assert world.reasons().count("TrainerLost") == 2
    assert world.reasons().count("PartitionLost") == 2
    assert lives
