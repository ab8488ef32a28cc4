"""What ends a trainer from within: an exit of user code at once, a fatal signal the second time at one place."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from psmaster.model.job import ErrorInfo, JobState
from psmaster.model.process import Failure, LastPosition
from tests.harness.master_world import TRAINER, World

TRACEBACK = 'Traceback (most recent call last):\n  File "task.py", line 9, in loss\n    boom()\n'


@pytest.fixture
def world() -> World:
    world = World()
    world.running()
    return world


def position(version: int = 1, shard: int = 3, activity: str = "train") -> LastPosition:
    return LastPosition(activity=activity, version=version, shard=shard, call="loss", traceback=TRACEBACK)


def crash(world: World, name: str, number: int = signal.SIGSEGV, **where: Any) -> None:
    world.exit(name, signal=int(number), position=position(**where))


def error(world: World) -> ErrorInfo:
    found = world.job()
    assert found.state is JobState.FAILED
    assert found.error is not None
    return found.error


def test_a_second_fatal_signal_at_one_place_fails_the_job(world: World) -> None:
    crash(world, "trainer-0")
    assert world.job().state.live
    assert "TrainerLost" in world.reasons()
    crash(world, "trainer-1", signal.SIGABRT)  # to which the shard has moved
    found = error(world)
    assert found.code == "PS-2009"
    details = {"file": "task.py", "line": "9", "function": "loss", "step": "2", "shard": "3", "signal": "SIGABRT"}
    assert details.items() <= dict(found.details).items()
    assert found.detail("process") == "trainer-1"
    assert world.job().traceback == TRACEBACK


@pytest.mark.parametrize("other", [{"version": 2}, {"shard": 2}, {"activity": "evaluate"}])
def test_a_signal_at_another_place_is_a_loss(world: World, other: dict[str, Any]) -> None:
    crash(world, "trainer-0")
    crash(world, "trainer-1", **other)
    assert world.job().state.live


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_from_outside_say_nothing_about_the_code(world: World, number: int) -> None:
    crash(world, "trainer-0", number)
    crash(world, "trainer-1", number)
    assert world.job().state.live
    assert world.job().crashes == ()


def test_want_of_memory_is_no_crash(world: World) -> None:
    world.exit("trainer-0", signal=int(signal.SIGABRT), out_of_memory=True, position=position())
    assert world.job().crashes == ()


def test_a_restarted_master_remembers_the_first_signal(world: World) -> None:
    crash(world, "trainer-0")
    world.restart()
    assert world.job().crashes == (("train", 1, 3),)


def test_a_resumed_job_begins_anew(world: World) -> None:
    crash(world, "trainer-0")
    crash(world, "trainer-1")
    world.take(lambda tx: tx.resume("job-aaaaaa"))
    assert world.job().crashes == ()


def test_an_exit_of_user_code_fails_the_job_at_once(world: World) -> None:
    left = ErrorInfo(code="PS-2009", cause="loss ended the process: it exited with code 0")
    world.exit("trainer-0", exit_code=0, error=left, position=position())
    found = error(world)
    assert (found.code, found.detail("step"), found.detail("shard")) == ("PS-2009", "2", "3")
    assert "TrainerLost" not in world.reasons()


def test_a_failure_waits_for_the_records_of_the_steps_before_it(world: World) -> None:
    raised = ErrorInfo(code="PS-2001", cause="loss raised ValueError")
    world.report("trainer-0", Failure(error=raised, step=13, committed=12))
    assert world.job().state.live
    assert world.job().generation == 1, "nothing is moved meanwhile"
    world.commit(*range(6, 13))
    assert (error(world).code, world.job().step) == ("PS-2001", 12)
    assert error(world).detail("step") == "13"


def test_it_does_not_wait_for_ever(world: World) -> None:
    raised = ErrorInfo(code="PS-2001", cause="loss raised ValueError")
    world.report("trainer-0", Failure(error=raised, step=13, committed=12))
    world.wait(world.limits.record_s + 0.5)
    assert (error(world).code, world.job().step) == ("PS-2001", 5)


def test_a_crash_while_loading_counts_as_one_place() -> None:
    world = World()
    world.cluster(2)
    world.submit()
    crash(world, "trainer-0", activity="load", version=0, shard=-1)
    crash(world, "trainer-1", activity="load", version=0, shard=-1)
    assert dict(error(world).details).get("step") is None
    assert TRAINER.final_step
