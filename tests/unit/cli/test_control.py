"""wait, stop, resume, delete."""

from __future__ import annotations

import pytest

from pscluster.errors import StateError
from pscluster.v1 import jobs_pb2
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster, ended_message, job_message
from tests.unit.cli.test_show import node_message


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--for=succeeded"], 0), (["--for", "step=50"], 0), (["--for=ended"], 0), (["--for=stopped"], 1), ([], 0)],
)
def test_wait_on_a_job_that_succeeded(run: Psctl, fake: FakeMaster, arguments: list[str], code: int) -> None:
    fake.jobs["x"] = ended_message()
    result = run("wait", "lm", *arguments)
    assert result.exit_code == code
    assert result.stdout == ("lm-abc123\n" if code == 0 else "")


def test_wait_for_nonsense_exits_2(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = ended_message()
    result = run("wait", "lm", "--for=glory")
    assert result.exit_code == 2
    assert "one of running" in result.stderr


def test_wait_exits_with_the_jobs_code(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = ended_message(jobs_pb2.JOB_STATE_STOPPED)
    assert run("wait", "lm").exit_code == 103
    fake.jobs["x"] = ended_message(jobs_pb2.JOB_STATE_FAILED, reason="it failed")
    result = run("wait", "lm")
    assert result.exit_code == 100
    assert "it failed" in result.stderr


def test_stop_waits_for_the_end(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = job_message()
    fake.watches = [lambda: iter([job_message(), ended_message(jobs_pb2.JOB_STATE_STOPPED, step=40)])]
    result = run("stop", "lm")
    assert (result.exit_code, result.stdout) == (0, "lm-abc123\n")
    assert "is STOPPED at step 40" in result.stderr


def test_stop_without_waiting(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = job_message()
    result = run("stop", "lm", "--no-wait")
    assert (result.exit_code, result.stdout) == (0, "lm-abc123\n")
    assert fake.watched == []


def test_resume_may_follow(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = job_message(state=jobs_pb2.JOB_STATE_QUEUED)
    assert "psctl follow lm-abc123" in run("resume", "lm").stderr
    fake.watches = [lambda: iter([ended_message()])]
    result = run("resume", "lm", "--follow")
    assert (result.exit_code, result.stdout) == (0, "lm-abc123\n")
    assert "SUCCEEDED at step 100" in result.stderr


def test_delete_takes_several_and_stops_at_the_first_refusal(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = ended_message()
    assert run("delete", "lm", "lm-abc123").stdout == "lm-abc123\nlm-abc123\n"
    fake.failures["Delete"] = [StateError("lm-abc123 is RUNNING", action="psctl stop it first")]
    result = run("delete", "lm")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "PS-1004" in result.stderr


# ---- drain ----


def test_drain_waits_and_prints_what_for(run: Psctl, fake: FakeMaster) -> None:
    fake.node_list = [node_message()]
    late = run("drain", "worker-0", "--timeout", "1s")
    assert (late.exit_code, late.stdout) == (101, "")
    assert "job: moves" in late.stderr
    assert "psctl drain worker-0 --undo" in late.stderr
    assert run("nodes").stdout.splitlines()[1].split()[2] == "yes,draining"
    fake.drain_states = ["drained", "draining"]
    done = run("drain", "worker-0")
    assert (done.exit_code, done.stdout) == (0, "worker-0\n")
    assert "psctl drain worker-0 --undo" in done.stderr
    assert run("drain", "worker-0", "--no-wait").stdout == "worker-0\n"
    undone = run("drain", "worker-0", "--undo")
    assert undone.stdout == "worker-0\n" and "again" in undone.stderr
    assert run("drain", "worker-0", "--undo").stderr == "worker-0 was not drained\n"
    assert fake.node_list[0].drain == ""
    assert run("drain", "worker-9").exit_code == 102


def test_drain_of_a_drained_node_that_is_away_returns_at_once(run: Psctl, fake: FakeMaster) -> None:
    fake.node_list = [node_message()]
    fake.drained_away = {"worker-1"}
    done = run("drain", "worker-1", "--timeout", "5s")
    assert (done.exit_code, done.stdout) == (0, "worker-1\n"), done.stderr
    assert "worker-1 is not connected" in done.stderr
    assert "psctl drain worker-1 --undo" in done.stderr
    undone = run("drain", "worker-1", "--undo")
    assert undone.stdout == "worker-1\n" and "once it is connected" in undone.stderr
