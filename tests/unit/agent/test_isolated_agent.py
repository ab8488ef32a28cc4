"""An agent with a key, as a process of its own: which isolation it registers, and what its trainers reach."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 60.0
PROGRAM = """
import sys
from pscluster.agent.daemon import AgentRole, run
role = AgentRole(
    name="worker", module="played_process", runs="trainers", default_slots=2, runs_user_code={runs_user_code}
)
sys.exit(run(role, sys.argv[1:]))
"""
Body = Callable[[Any, "subprocess.Popen[str]"], Awaitable[None]]


def run(bench: Any, isolation: str, body: Body, runs_user_code: bool = True) -> None:
    """Run `body(master, agent)` beside an agent process that has a key."""
    identity = bench.state_dir / "identity"
    identity.mkdir(parents=True, mode=0o700)
    # The key of a join that was begun: with it alone an agent is no member yet, and takes the token.
    (identity / "request.pem").write_text("the secret key")
    (identity / "request.pem").chmod(0o600)

    async def everything() -> None:
        master = bench.master()
        await master.start()
        flags = ["--node-id", "worker-0", "--master", master.address, "--state-dir", str(bench.state_dir)]
        flags += ["--token-file", str(bench.token_file), "--isolation", isolation]
        agent = subprocess.Popen(  # noqa: ASYNC220 - for milliseconds
            [sys.executable, "-c", PROGRAM.format(runs_user_code=runs_user_code), *flags],
            env=bench.environ(),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            async with asyncio.timeout(DEADLINE_S):
                await body(master, agent)
        finally:
            agent.terminate()
            await asyncio.to_thread(agent.communicate)
            await master.stop()

    asyncio.run(everything())


async def spied(bench: Any, master: Any) -> Mapping[str, Any]:
    """What a trainer reported that tried to read the key."""
    spec = bench.trainer("trainer-0", "spy")
    spec.spec_json = json.dumps({"mode": "spy", "key": str(bench.state_dir / "identity/request.pem")})
    await master.assign(spec)
    lines = await master.until(lambda: [line for line in master.lines() if line.startswith("spied ")])
    found: Mapping[str, Any] = json.loads(lines[0].removeprefix("spied "))
    return found


@pytest.mark.parametrize("isolation", ["namespace", "landlock"])
def test_a_trainer_does_not_read_the_key(bench: Any, isolation: str) -> None:
    async def body(master: Any, agent: subprocess.Popen[str]) -> None:
        registered = await master.until(lambda: master.registered or agent.poll() is not None)
        if registered is True:
            pytest.skip(f"this machine does not give {isolation}")
        assert registered[0].isolation == isolation
        found = await spied(bench, master)
        assert found["got"] in ("FileNotFoundError", "PermissionError")
        assert (found["uid"], found["scratch"], found["cache"]) == (os.getuid(), True, True)
        assert not found["join"]
        with pytest.raises(PermissionError):
            _read_as_the_same_user_without_capabilities(agent.pid)

    run(bench, isolation, body)


def _read_as_the_same_user_without_capabilities(pid: int) -> None:
    """What a process of the agent's user gets of its memory; root only without its capabilities."""
    code = f"open('/proc/{pid}/environ').read()"
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"] if os.geteuid() == 0 else []
    done = subprocess.run([*drop, sys.executable, "-c", code], capture_output=True, text=True)
    if "PermissionError" in done.stderr:
        raise PermissionError(pid)
    assert done.returncode == 0, done.stderr


def test_auto_takes_a_way_that_holds(bench: Any) -> None:
    async def body(master: Any, _agent: subprocess.Popen[str]) -> None:
        (registered,) = await master.until(lambda: master.registered)
        found = await spied(bench, master)
        assert (found["got"] == "the secret key") == (registered.isolation == "none")
        assert (found["uid"] == os.getuid()) == (registered.isolation != "uid")

    run(bench, "auto", body)


def test_without_isolation_it_is_reported_and_the_key_is_read(bench: Any) -> None:
    async def body(master: Any, _agent: subprocess.Popen[str]) -> None:
        (registered,) = await master.until(lambda: master.registered)
        assert registered.isolation == "none"
        assert (await spied(bench, master))["got"] == "the secret key"

    run(bench, "none", body)


def test_an_agent_without_user_code_registers_none(bench: Any) -> None:
    async def body(master: Any, _agent: subprocess.Popen[str]) -> None:
        (registered,) = await master.until(lambda: master.registered)
        assert registered.isolation == ""

    run(bench, "auto", body, runs_user_code=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_way_that_this_user_does_not_have_is_refused(bench: Any, tmp_path: Path) -> None:
    """Root cannot become another user from where that user cannot go."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    bench.state_dir = closed / "state"

    async def body(master: Any, agent: subprocess.Popen[str]) -> None:
        code = await asyncio.to_thread(agent.wait)
        assert code != 0
        assert not master.registered

    run(bench, "uid", body)
