"""A cluster that ends in the middle of a job, in any way, leaves no process, socket, shared memory or file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from harness.cluster import LocalCluster, wait_gone
from harness.held_task import held_spec
from harness.jobs import lm_spec
from pscluster.cli.local.processes import command
from pscluster.settings import make_runtime_dir, runtime_dir

TORCHS_OWN = "torchinductor_"  # a directory that torch makes for its user, and keeps
SIMULATIONS = "simulation-"  # directories of `make simulate`, which may run beside the tests
STEPS = 4
SMALL: dict[str, Any] = {"layers": 1, "d_model": 32, "heads": 2, "context": 8, "vocabulary": 64}


class Site(LocalCluster):
    """A cluster with its own temporary directory, whose processes all carry a mark."""

    def __init__(self, state_dir: Path, temporary: Path) -> None:
        super().__init__(state_dir)
        self.mark = uuid.uuid4().hex
        self.temporary = temporary
        self.environment |= {"TMPDIR": str(temporary), "LEFTOVER_MARK": self.mark}
        self.shared_memory = set(os.listdir("/dev/shm"))

    def note_processes(self) -> None:
        """Does nothing: the mark identifies all processes."""

    def running(self) -> list[psutil.Process]:
        """Every live process that this cluster or a psctl of this test started, with all descendants."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("LEFTOVER_MARK") == self.mark
        except psutil.Error:  # it has ended, is a zombie, or may not be inspected
            return False

    def left(self) -> list[str]:
        """What should not be left; persistent state (jobs, logs, the token) is not counted."""
        sockets = Path("/proc/net/unix").read_text().splitlines()
        found = [f"process {process.pid} {process.cmdline()}" for process in self.running()]
        found += [line for line in sockets if str(self.temporary) in line or str(self.state_dir) in line]
        found += [str(path) for path in self.temporary.rglob("*") if not path.name.startswith(TORCHS_OWN)]
        shared = set(os.listdir("/dev/shm")) - self.shared_memory
        found += [f"/dev/shm/{name}" for name in shared if not name.startswith(SIMULATIONS)]
        found += [str(path) for path in self.state_dir.rglob("*") if path.is_socket() or path.suffix == ".writing"]
        found += [str(path) for path in self.state_dir.glob("worker-*/jobs/*")]
        found += [str(path) for path in self.state_dir.rglob(".*") if path.name != ".gitignore"]
        return found


class Held(NamedTuple):
    """A job in mid-run, and the gate that holds it there."""

    job: str
    gate: Path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    temporary = Path(tempfile.mkdtemp(prefix="pst-", dir="/tmp"))  # short: sockets are named below it
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    site = Site(tmp_path / "state", temporary)
    yield site
    for process in site.running():  # of a test that failed
        process.kill()
    shutil.rmtree(temporary)


def hold_a_job(site: Site, root: Path) -> Held:
    """Submit a job, and return when a step is committed and every trainer waits in the next."""
    directory = root / "job"
    directory.mkdir()
    spec: dict[str, Any] = {**lm_spec(steps=STEPS, **SMALL), "workers": {"max": 1}, "evaluate": {}}
    held, gate = held_spec(spec, directory, free=10)
    job = site.submit(held, directory)
    site.wait(job, "step=1")
    return Held(job, gate)


def started(site: Site) -> int:
    """The number of running processes, which must not be zero."""
    count = len(site.running())
    assert count >= 3
    assert any(path.is_socket() for path in site.temporary.rglob("*"))
    return count


@pytest.mark.slow
def test_after_down_in_the_middle_of_a_job(site: Site, tmp_path: Path) -> None:
    site.up(1, 1)
    hold_a_job(site, tmp_path)
    assert started(site) == 5
    site.psctl("down")
    assert site.left() == []


@pytest.mark.slow
def test_after_kill_9_of_everything_and_a_new_start_that_finishes_the_job(site: Site, tmp_path: Path) -> None:
    site.up(1, 1)
    held = hold_a_job(site, tmp_path)
    assert started(site) == 5
    killed = site.running()
    for process in killed:
        process.kill()
    wait_gone(killed)
    assert site.left() != []  # sockets of killed processes
    site.up(1, 1)
    held.gate.unlink()
    site.wait(held.job, "succeeded")
    assert site.describe(held.job)["step"] == STEPS
    site.psctl("down")
    assert site.left() == []


@pytest.mark.slow
def test_after_sigterm_of_each_daemon_in_the_middle_of_a_job(site: Site, tmp_path: Path) -> None:
    """Each ends with exit code 0, and so do the processes that it started."""
    state = site.state_dir
    state.mkdir(mode=0o700)
    (state / "token").write_text("a-token-of-this-test\n")
    (state / "token").chmod(0o600)
    make_runtime_dir(state)
    address = f"unix:{runtime_dir(state)}/master.sock"
    daemons = {}
    for name in ("master", "worker-0", "server-0"):
        words = command(name, state, address, state / "token")
        daemons[name] = subprocess.Popen(words, env=site.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert daemons["master"].stdout is not None
    assert any(b"serves" in line for line in daemons["master"].stdout)
    hold_a_job(site, tmp_path)
    assert started(site) == 5
    for number, name in enumerate(("worker-0", "server-0", "master")):
        children = psutil.Process(daemons[name].pid).children(recursive=True)
        assert len(children) == (name != "master")
        daemons[name].send_signal(signal.SIGTERM)
        output, _ = daemons[name].communicate(timeout=30)
        assert daemons[name].returncode == 0, output.decode()
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert not runtime_dir(state / name).exists()
        assert len(site.running()) == [3, 1, 0][number]
    runtime_dir(state).rmdir()  # the test made it, not the master; it must be empty by now
    assert site.left() == []


@pytest.mark.slow
def test_after_ctrl_c_of_a_cluster_in_the_foreground(site: Site, tmp_path: Path) -> None:
    """Ctrl-C is pressed repeatedly."""
    process = site.start("up", "--workers", "1", "--servers", "1", "--foreground")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("unix:")
    hold_a_job(site, tmp_path)
    assert started(site) == 6
    os.killpg(process.pid, signal.SIGINT)
    while "stopping the cluster" not in (line := process.stderr.readline()):
        assert line, "psctl ended without a message"
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
    _, answer = process.communicate(timeout=60)
    assert process.returncode == 0, answer
    assert "Traceback" not in answer
    assert site.left() == []


def test_after_ctrl_c_while_it_starts(site: Site) -> None:
    process = site.start("up", "--workers", "1", "--servers", "1")
    while not (site.state_dir / "cluster.json").exists():  # written before any daemon is ready
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, answer = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), answer
    assert site.left() == []
