"""up and down with real processes: stand-ins for the daemons that start fast and misbehave on request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import pscluster
from pscluster.cli.local import processes
from pscluster.cli.local.record import Daemon
from pscluster.settings import runtime_dir

# A master that answers GetCluster and ListNodes; a node is there as long as its file is.
MASTER = """
import argparse, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import grpc
from pscluster.v1 import jobs_pb2, jobs_pb2_grpc
def main():
    parser = argparse.ArgumentParser()
    for flag in ("--state-dir", "--token-file", "--metrics-listen", "--listen"):
        parser.add_argument(flag)
    flags = parser.parse_args()
    ready = Path(flags.token_file).parent / "ready"
    ready.mkdir(exist_ok=True)
    class Jobs(jobs_pb2_grpc.JobsServicer):
        def GetCluster(self, request, context):
            return jobs_pb2.Cluster(version="0.1.0", protocol=1, healthy=True)
        def ListNodes(self, request, context):
            return jobs_pb2.ListNodesReply(nodes=[jobs_pb2.Node(node_id=p.name, ready=True) for p in ready.iterdir()])
    server = grpc.server(ThreadPoolExecutor(2))
    jobs_pb2_grpc.add_JobsServicer_to_server(Jobs(), server)
    server.add_insecure_port(flags.listen)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    server.start()
    ended.wait()
    server.stop(0).wait()
"""
NODE = """
import argparse, signal, subprocess, sys
from pathlib import Path
def main():
    parser = argparse.ArgumentParser()
    for flag in ("--state-dir", "--token-file", "--metrics-listen", "--master", "--node-id", "--slots"):
        parser.add_argument(flag)
    flags = parser.parse_args()
    root = Path(flags.token_file).parent
    modes = (root / "misbehave").read_text().split() if (root / "misbehave").exists() else []
    if "refuse" in modes and flags.node_id == "worker-1":
        sys.exit("PS-4001: 127.0.0.1:9 is taken (choose another)")
    file = root / "ready" / flags.node_id
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=ignore)
    file.parent.mkdir(exist_ok=True)
    file.touch()
    signal.sigwait([signal.SIGTERM])
    file.unlink()
    if "linger" in modes:
        return
    child.terminate()
    child.wait()
def ignore():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
"""


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or a zombie that its parent has not yet reaped."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Local:
    """psctl as a program on one state directory, with the stand-ins first on its path."""

    def __init__(self, root: Path) -> None:
        self.state_dir = root / "state"
        fakes = root / "fakes"
        for package, text in (("psmaster", MASTER), ("psworker", NODE), ("psserver", NODE)):
            (fakes / package).mkdir(parents=True)
            (fakes / package / "__init__.py").write_text("")
            program = textwrap.dedent(text) + '\nif __name__ == "__main__":\n    sys.exit(main())\n'
            (fakes / package / "daemon.py").write_text(program)
        path = os.pathsep.join([str(fakes), str(Path(pscluster.__file__).parents[1])])
        self.environ = {**os.environ, "PYTHONPATH": path, "PS_STATE_DIR": str(self.state_dir)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pscluster.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environ,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=90)
        return process.returncode, stdout, stderr

    def up(self, *arguments: str) -> str:
        code, stdout, stderr = self.run("up", *arguments)
        assert code == 0, stderr
        assert stdout == f"unix:{runtime_dir(self.state_dir)}/master.sock\n"
        return stderr

    def pids(self) -> dict[str, int]:
        return {daemon.name: daemon.pid for daemon in processes.find(self.state_dir)}

    def misbehave(self, how: str) -> None:
        self.state_dir.mkdir(mode=0o700, exist_ok=True)
        (self.state_dir / "misbehave").write_text(how)

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state_dir / "cluster.json").read_text())
        return found


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    found = Local(tmp_path)
    yield found
    processes.end(processes.find(found.state_dir), found.state_dir, grace_s=2)
    code, _, stderr = found.run("down")
    assert code == 0, stderr


def test_up_is_ready_idempotent_and_down_leaves_nothing(local: Local) -> None:
    answer = local.up("--workers", "2", "--servers", "1")
    assert "the cluster is up: 2 workers, 1 server" in answer
    pids = local.pids()
    assert sorted(pids) == ["master", "server-0", "worker-0", "worker-1"]
    assert {d["name"]: d["pid"] for d in local.record()["daemons"]} == pids
    assert (local.state_dir / "token").stat().st_mode & 0o777 == 0o600
    assert runtime_dir(local.state_dir).stat().st_mode & 0o777 == 0o700
    assert all(os.getsid(pid) == pid for pid in pids.values())
    children = [child for pid in pids.values() for child in psutil.Process(pid).children()]
    assert "was up already" in local.up()
    assert local.pids() == pids
    code, stdout, stderr = local.run("down")
    assert (code, stdout, stderr) == (0, "", "the cluster is down\n")
    assert local.pids() == {}
    assert all(has_ended(child) for child in children)
    assert not runtime_dir(local.state_dir).exists()
    assert not (local.state_dir / "cluster.json").exists()
    assert (local.state_dir / "token").exists()
    assert "no cluster runs" in local.run("down")[2]


def test_up_replaces_what_was_killed_and_only_that(local: Local) -> None:
    local.up("--workers", "2", "--servers", "1")
    before = local.pids()
    for name in ("master", "worker-1"):
        psutil.Process(before[name]).kill()
    (local.state_dir / "ready/worker-1").unlink()
    local.up()
    after = local.pids()
    assert sorted(after) == sorted(before)
    assert {name for name in after if after[name] != before[name]} == {"master", "worker-1"}


def test_up_with_other_counts_adds_and_removes_nodes(local: Local) -> None:
    local.up("--workers", "1", "--servers", "1")
    first = local.pids()
    local.up("--workers", "3")
    assert sorted(local.pids()) == ["master", "server-0", "worker-0", "worker-1", "worker-2"]
    answer = local.up("--workers", "1", "--servers", "2")
    assert "stopping worker-1, worker-2" in answer
    last = local.pids()
    assert sorted(last) == ["master", "server-0", "server-1", "worker-0"]
    assert {name: last[name] for name in first} == first


def test_up_over_the_state_of_a_killed_run(local: Local) -> None:
    local.up("--workers", "1", "--servers", "1")
    killed = [psutil.Process(pid) for pid in local.pids().values()]
    for process in [child for p in killed for child in p.children()] + killed:
        process.kill()
    psutil.wait_procs(killed, timeout=10)
    for file in (local.state_dir / "ready").iterdir():
        file.unlink()
    assert "the cluster is up" in local.up("--workers", "1", "--servers", "1")


def test_a_stale_record_never_ends_a_foreign_process(local: Local) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        try:
            local.state_dir.mkdir(mode=0o700)
            created = psutil.Process(stranger.pid).create_time()
            daemon = {"name": "worker-0", "pid": stranger.pid, "created_s": created}
            (local.state_dir / "cluster.json").write_text(json.dumps({"version": 1, "daemons": [daemon]}))
            local.up("--workers", "1", "--servers", "1")
            assert local.run("down")[0] == 0
            processes.end([Daemon(name="worker-0", pid=stranger.pid, created_s=created)], local.state_dir)
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_daemon_that_cannot_start_is_named_and_nothing_is_left(local: Local) -> None:
    local.misbehave("refuse")
    code, stdout, stderr = local.run("up", "--workers", "2", "--servers", "1")
    assert (code, stdout) == (1, "")
    assert "error: PS-4001: worker-1 could not start: 127.0.0.1:9 is taken" in stderr
    assert "hint: choose another" in stderr
    assert local.pids() == {}
    assert not runtime_dir(local.state_dir).exists()


def test_what_a_node_left_running_is_ended_too(local: Local) -> None:
    local.misbehave("linger")
    local.up("--workers", "1", "--servers", "1")
    children = [child for pid in local.pids().values() for child in psutil.Process(pid).children()]
    assert len(children) == 2
    assert local.run("down")[0] == 0
    assert all(has_ended(child) for child in children)


def test_concurrent_ups_make_one_cluster(local: Local) -> None:
    ups = [local.start("up", "--workers", "1", "--servers", "1") for _ in range(3)]
    outcomes = [up.communicate(timeout=90) for up in ups]
    assert [up.returncode for up in ups] == [0, 0, 0], outcomes
    assert sorted(local.pids()) == ["master", "server-0", "worker-0"]
    assert sum("was up already" in stderr for _, stderr in outcomes) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_foreground_takes_the_cluster_down(local: Local, number: signal.Signals) -> None:
    process = local.start("up", "--workers", "1", "--servers", "1", "--foreground")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("unix:")
    assert len(local.pids()) == 3
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "stopping the cluster" in stderr
    assert local.pids() == {}
    assert not runtime_dir(local.state_dir).exists()


def test_foreground_ends_when_a_daemon_does(local: Local) -> None:
    process = local.start("up", "--workers", "1", "--servers", "1", "--foreground")
    assert process.stdout is not None
    process.stdout.readline()
    psutil.Process(local.pids()["worker-0"]).kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "PS-4003: worker-0" in stderr
    assert local.pids() == {}


def test_a_state_directory_that_cannot_be_written(local: Local, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, stderr = local.run("up", "--state-dir", str(tmp_path / "file" / "state"))
    assert code == 1
    assert "PS-4002" in stderr


def test_up_of_a_cluster_elsewhere_is_refused(local: Local) -> None:
    code, _, stderr = local.run("--address", "host:1", "up")
    assert code == 2
    assert "not a local cluster" in stderr
