"""The agent as a process of its own: how it ends, how it is killed, what a successor finds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(60)

DEADLINE_S = 20.0
PROGRAM = """
import sys
from pscluster.agent.daemon import run
from pscluster.agent.daemon import AgentRole
role = AgentRole(name="worker", module="played_process", runs="trainers", default_slots=2)
sys.exit(run(role, sys.argv[1:]))
"""


class Agents:
    """Starts agents as processes; none outlives the test."""

    def __init__(self, bench: Any) -> None:
        self._bench = bench
        self._started: list[subprocess.Popen[str]] = []

    def start(self, **flags: str) -> subprocess.Popen[str]:
        given = {
            "node_id": "worker-0",
            "master": f"unix:{self._bench.directory}/m.sock",
            "state_dir": str(self._bench.state_dir),
            "token_file": str(self._bench.token_file),
            **flags,
        }
        arguments = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
        agent = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], env=self._bench.environ(), stderr=subprocess.PIPE, text=True
        )
        self._started.append(agent)
        return agent

    def close(self) -> None:
        for agent in self._started:
            if agent.poll() is None:
                agent.kill()
            agent.communicate()


def run(bench: Any, body: Callable[[Any, Agents], Awaitable[None]]) -> None:
    """Run `body(master, agents)`."""

    async def everything() -> None:
        master = bench.master()
        await master.start()
        try:
            await body(master, agents)
        finally:
            await master.stop()

    agents = Agents(bench)
    try:
        asyncio.run(everything())
    finally:
        agents.close()


def test_sigterm_ends_the_processes_first_and_tells_the_master(bench: Any) -> None:
    async def body(master: Any, agents: Agents) -> None:
        agent = agents.start()
        await master.assign(bench.trainer("trainer-0", "ticking"), bench.trainer("trainer-1", "serve"))
        await master.until(lambda: len(master.reports("progress")) > 3 and master.reports("trainer_ready"))
        agent.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(agent.wait, DEADLINE_S) == 0
        for name in ("trainer-0", "trainer-1"):
            status = master.exit_of(f"job/{name}/1")
            assert (status.exit_code, status.expected) == (0, True)
        assert master.reports("finished")
        assert master.durable[max(master.durable)].WhichOneof("body") == "goodbye"
        assert not bench.runtime_dir.exists()

    run(bench, body)


def test_sigterm_without_a_master_does_not_wait_for_one(bench: Any) -> None:
    async def body(master: Any, agents: Agents) -> None:
        agent = agents.start()
        await master.assign(bench.trainer("trainer-0", "serve"))
        await master.until(lambda: master.reports("trainer_ready"))
        await master.stop()
        agent.send_signal(signal.SIGTERM)
        _, stderr = await asyncio.to_thread(agent.communicate, timeout=DEADLINE_S)
        assert agent.returncode == 0
        assert "waiting for the master" in stderr
        assert "did not acknowledge the last messages" not in stderr

    run(bench, body)


def test_kill_9_of_the_agent_leaves_no_process_and_a_successor_no_directory(bench: Any) -> None:
    async def body(master: Any, agents: Agents) -> None:
        first = agents.start()
        await master.assign(bench.trainer("trainer-0", "serve"), bench.trainer("trainer-1", "be_stubborn"))
        await master.until(lambda: len(master.reports("trainer_ready")) == 2)
        pids = [status.pid for status in master.messages("status")]
        first.kill()
        assert [await bench.gone(pid) for pid in pids] == [True, True]
        assert list(bench.runtime_dir.iterdir())
        await master.assign()
        second = agents.start()
        await master.until(lambda: len(master.hellos) == 2)
        assert not master.hellos[-1].processes
        assert master.registered[0].incarnation != master.registered[1].incarnation
        assert list(bench.runtime_dir.iterdir()) == []
        second.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(second.wait, DEADLINE_S) == 0
        assert not bench.runtime_dir.exists()

    run(bench, body)


@pytest.mark.parametrize(
    ("flags", "exit_code", "message"),
    [
        ({"token_file": "/nowhere/token"}, 4, "PS-1005: no token file at /nowhere/token"),
        ({"metrics_listen": "nonsense"}, 2, "PS-1006: 'nonsense' is not HOST:PORT"),
        ({"slots": "0"}, 2, "PS-1006: slots must be at least 1"),
        ({"log_level": "loud"}, 2, "PS-1006: log level 'loud'"),
        ({"state_dir": "/proc/nowhere"}, 1, "PS-4002: cannot use the state directory /proc/nowhere"),
        ({"master": "here"}, 2, "PS-1006: master 'here'"),
    ],
)
def test_an_agent_that_cannot_start_says_why_in_one_line(
    bench: Any, flags: dict[str, str], exit_code: int, message: str
) -> None:
    agents = Agents(bench)
    try:
        _, stderr = (agent := agents.start(**flags)).communicate(timeout=DEADLINE_S)
    finally:
        agents.close()
    assert agent.returncode == exit_code
    assert stderr.startswith(message)
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("program", ["psworker", "psserver"])
def test_the_daemons_load_no_torch(program: str) -> None:
    code = f"import sys, {program}.daemon, pscluster.agent.node\nraise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_process_whose_agent_is_gone_already_does_not_start(tmp_path: Path) -> None:
    environ = {**os.environ, "PS_AGENT_PID": "1", "PYTHONPATH": str(tmp_path)}
    (tmp_path / "never.py").write_text("print('ran')\n")
    command = [sys.executable, "-P", "-m", "pscluster.agent.launch", "never"]
    outcome = subprocess.run(command, env=environ, capture_output=True, check=False)
    assert outcome.returncode == 128 + signal.SIGKILL
    assert outcome.stdout == b""
