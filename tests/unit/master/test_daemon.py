"""The process: its settings, its lock, its sockets, its exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pscluster.errors import AddressInUseError, SettingsError, StorageError
from pscluster.settings import resolve
from psmaster.listening import bind
from psmaster.server import MasterSettings, claim

DEADLINE_S = 30.0
REQUIRED = {"state_dir": Path("/s"), "token_file": Path("/t")}


@pytest.mark.parametrize(
    "flags",
    [
        {"listen": ["a.host:7070"]},
        {"listen": ["::1:7070"]},
        {"listen": ["[::1]"]},
        {"listen": ["localhost"]},
        {"join_listen": "unix:/j"},
        {"certificate_lifetime_s": 1.0},
        {"data_security": "none"},
        {"listen": ["127.0.0.1:70700"]},
        {"listen": ["unix:"]},
        {"listen": ["unix:/" + "x" * 120]},
        {"listen": []},
        {"suspicion_s": 0.0},
        {"state_dir": None},
        {"listne": ["127.0.0.1:1"]},
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(flags: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        resolve(MasterSettings, {**REQUIRED, **flags}, {})


def test_settings_come_from_flags_then_environment() -> None:
    environ = {"PS_LISTEN": "unix:/a,127.0.0.1:0", "PS_SUSPICION_S": "5"}
    settings = resolve(MasterSettings, {**REQUIRED, "suspicion_s": 2.0}, environ)
    assert settings.listen == ("unix:/a", "127.0.0.1:0")
    assert settings.suspicion_s == 2.0


def test_two_masters_never_share_a_state_directory(tmp_path: Path) -> None:
    first = claim(tmp_path / "state")
    with pytest.raises(StorageError, match=f"pid {os.getpid()}"):
        claim(tmp_path / "state")
    first.close()
    claim(tmp_path / "state").close()


def test_an_unwritable_state_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write in"):
        claim(tmp_path / "file" / "state")


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()

    async def test() -> None:
        server = grpc.aio.server()
        bind(server, f"unix:{path}")
        await server.start()
        with pytest.raises(AddressInUseError):
            bind(grpc.aio.server(), f"unix:{path}")
        await server.stop(None)

    asyncio.run(test())


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = psmaster(tmp_path, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("PS-4001: ")


def test_what_keeps_it_from_starting_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = psmaster(tmp_path, "--state-dir", str(tmp_path / "file" / "state"))
    assert done.returncode == 1
    assert done.stderr.startswith("PS-4002: cannot write in")
    assert len(done.stderr.splitlines()) == 1
    done = psmaster(tmp_path, "--token-file", str(tmp_path / "nowhere"))
    assert done.returncode == 4
    assert done.stderr.startswith("PS-1005: ")
    done = psmaster(tmp_path, "--suspicion-s", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("PS-1006: ")


def psmaster(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a psmaster that is expected not to start."""
    return subprocess.run(
        [*COMMAND, *flags_for(tmp_path), *flags], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


COMMAND = (sys.executable, "-m", "psmaster.daemon")


def flags_for(tmp_path: Path) -> list[str]:
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text("token")
    return [
        *("--state-dir", str(tmp_path / "state")),
        *("--listen", f"unix:{tmp_path}/m.sock"),
        *("--token-file", str(token_file)),
    ]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A psmaster that serves."""
    with subprocess.Popen([*COMMAND, *flags_for(tmp_path)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until_ready(f"unix:{tmp_path}/m.sock")
            yield process
        finally:
            process.kill()


def wait_until_ready(address: str) -> None:
    with grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="ready")
        watch = stub.Watch(request, timeout=DEADLINE_S, wait_for_ready=True)
        for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                watch.cancel()
                return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_order_and_leaves_no_socket(
    running: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    assert (tmp_path / "m.sock").exists()
    assert (tmp_path / "m.sock").stat().st_mode & 0o077 == 0
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
    running.send_signal(number)
    assert running.wait(DEADLINE_S) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "token"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "bundles",
        "cluster-id",
        "lock",
        "master.db",
    ]


def test_a_killed_master_starts_again_where_it_was(running: subprocess.Popen[bytes], tmp_path: Path) -> None:
    running.kill()
    running.wait(DEADLINE_S)
    with subprocess.Popen([*COMMAND, *flags_for(tmp_path)], stderr=subprocess.DEVNULL) as again:
        wait_until_ready(f"unix:{tmp_path}/m.sock")
        again.terminate()
        assert again.wait(DEADLINE_S) == 0


def test_help_loads_neither_grpc_nor_torch_and_the_master_never_torch() -> None:
    code = "import sys, psmaster.daemon; print('grpc' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]
    code = "import sys, psmaster.server; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False"]
