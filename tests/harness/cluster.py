"""A real local cluster for tests: `psctl up` in its own directory, with access to every process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pscluster.cli.local import record
from pscluster.cli.local.processes import command, daemon_dir, variables
from pscluster.cli.local.record import Daemon
from pscluster.client import Cluster as Client
from pscluster.client import Job
from pscluster.settings import master_address, runtime_dir, token_file

PSCTL = str(Path(sys.executable).parent / "psctl")
DEADLINE_S = 120.0


class LocalCluster:
    """One cluster under `state_dir`. Create it with `local_cluster`, which takes it down and checks what is left."""

    def __init__(self, state_dir: Path, environment: Mapping[str, str] | None = None) -> None:
        self.state_dir = state_dir
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("PS_")}
        self.environment |= {"PS_STATE_DIR": str(state_dir), "NO_COLOR": "1", **(environment or {})}
        self.seen: dict[int, psutil.Process] = {}
        self._restarted: list[subprocess.Popen[bytes]] = []

    # ---- psctl ----

    def psctl(
        self, *arguments: str, expect: int | None = 0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run psctl to its end; fails unless it exits with `expect` (None: any code)."""
        done = subprocess.run(
            [PSCTL, *arguments], env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S + 30
        )
        if expect is not None:
            assert done.returncode == expect, f"psctl {arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start psctl with its output on pipes; the caller collects it."""
        return subprocess.Popen(
            [PSCTL, *arguments],
            env=self.environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def up(self, workers: int = 2, servers: int = 1) -> None:
        self.psctl("up", "--workers", str(workers), "--servers", str(servers))
        self.note_processes()

    def down(self) -> None:
        """End all daemons; fails when that fails."""
        self.psctl("down")

    @property
    def shared(self) -> Path:
        """A directory that psctl, the daemons and the test see at the same path."""
        return self.state_dir.parent

    def submit(self, spec: Mapping[str, Any], directory: Path, *arguments: str) -> str:
        """Submit a spec as a file of `directory`; the job id."""
        path = directory / f"spec-{time.monotonic_ns()}.json"
        path.write_text(json.dumps(spec))
        return self.psctl("submit", str(path), *arguments).stdout.strip()

    def describe(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.psctl("describe", job, "-o", "json").stdout)
        return found

    def wait(self, job: str, goal: str) -> None:
        """Block until the job reaches the goal; fails when it ends otherwise."""
        done = self.psctl("wait", job, f"--for={goal}", f"--timeout={DEADLINE_S:.0f}", expect=None)
        if done.returncode:
            raise AssertionError(
                f"{goal} was not reached: {done.stderr}\n{self.psctl('describe', job, expect=None).stdout}"
            )
        self.note_processes()

    def until(self, job: str, holds: Callable[[Job], bool]) -> Job:
        """The job when `holds` was first true; fails when it ends, or the time is up, before."""
        with self.client() as client:
            found = None
            for found in client.watch(job, timeout_s=DEADLINE_S):
                if holds(found):
                    self.note_processes()
                    return found
        raise AssertionError(f"was not reached: {found.to_dict() if found else job}")

    def client(self) -> Client:
        """The public client library, connected."""
        return Client.connect(
            address=f"unix:{runtime_dir(self.state_dir)}/master.sock",
            token=(self.state_dir / "token").read_text().strip(),
        )

    # ---- processes ----

    def daemon(self, name: str) -> psutil.Process:
        """A daemon by name: "master", "worker-0", "server-0"."""
        record = json.loads((self.state_dir / "cluster.json").read_text())
        return psutil.Process(next(d["pid"] for d in record["daemons"] if d["name"] == name))

    def daemons(self) -> dict[str, psutil.Process]:
        """The recorded daemons that still exist, by name."""
        record = json.loads((self.state_dir / "cluster.json").read_text())
        found = {}
        for entry in record["daemons"]:
            try:
                found[entry["name"]] = psutil.Process(entry["pid"])
            except psutil.NoSuchProcess:
                continue
        return found

    @property
    def names(self) -> list[str]:
        """Of all daemons, whether they run or not."""
        return [daemon.name for daemon in record.load(self.state_dir)]

    def runs(self, name: str) -> bool:
        """Whether a daemon runs; one that is stopped (SIGSTOP) does."""
        (daemon,) = [daemon for daemon in record.load(self.state_dir) if daemon.name == name]
        try:
            process = psutil.Process(daemon.pid)
            same = abs(process.create_time() - daemon.created_s) < 0.5
            return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False

    def start_daemon(self, name: str) -> None:
        """Start a daemon that has ended with the command of `psctl up`; returns at once."""
        words = command(name, self.state_dir, master_address(self.state_dir), token_file(self.state_dir))
        with (self.state_dir / "logs" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words,
                cwd=daemon_dir(name, self.state_dir),
                env=self.environment | variables(name, ()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._restarted = [other for other in self._restarted if other.poll() is None]  # collects those that ended
        self._restarted.append(process)
        started = Daemon(name=name, pid=process.pid, created_s=psutil.Process(process.pid).create_time())
        others = [daemon for daemon in record.load(self.state_dir) if daemon.name != name]
        record.save(self.state_dir, master_address(self.state_dir), (*others, started))

    def directories_of(self, name: str) -> list[Path]:
        """Where an agent keeps what belongs to the processes of jobs: empty when it has none."""
        return [runtime_dir(self.state_dir / name), self.state_dir / name / "jobs"]

    def child(self, daemon: str) -> psutil.Process:
        """The one trainer or partition that an agent runs now."""
        return next(iter(self.daemon(daemon).children()))

    def note_processes(self) -> None:
        """Remember every process of the cluster, for the search of leftovers."""
        for process in self.daemons().values():
            try:
                for found in (process, *process.children(recursive=True)):
                    self.seen[found.pid] = found
            except psutil.NoSuchProcess:
                continue

    def kill(self, process: psutil.Process) -> None:
        """SIGKILL; returns when the process is gone."""
        process.send_signal(signal.SIGKILL)
        wait_gone([process])

    def remaining(self) -> list[str]:
        """What of the cluster still exists after `psctl down`: processes, sockets, shared memory, temporary files."""
        alive = [f"process {p.pid} {' '.join(p.cmdline())}" for p in self.seen.values() if _is_alive(p)]
        found = [str(path) for path in [runtime_dir(self.state_dir)] if path.exists()]
        for daemon in self.state_dir.glob("[ws]*-[0-9]*"):
            directory = runtime_dir(daemon)
            found += [str(directory)] if directory.exists() else []
        found += [str(path) for path in Path("/dev/shm").glob("ps-*")]
        found += [str(path) for path in self.state_dir.rglob(".*.writing")]
        return alive + found


@contextmanager
def local_cluster(
    root: Path,
    *,
    workers: int = 2,
    servers: int = 1,
    environment: Mapping[str, str] | None = None,
    master_dir: Path | None = None,
) -> Iterator[LocalCluster]:
    """A running cluster. It is taken down at the end, and nothing of it may be left.

    `environment`: additional variables of its daemons; `master_dir`: another directory for the master's state."""
    state_dir = Path(tempfile.mkdtemp(prefix="pst-", dir=root))
    cluster = LocalCluster(state_dir, environment)
    if master_dir is not None:
        (state_dir / "master").symlink_to(master_dir, target_is_directory=True)
    try:
        cluster.up(workers, servers)
        yield cluster
        cluster.note_processes()
    finally:
        cluster.down()
    assert cluster.remaining() == []


def wait_gone(processes: Sequence[psutil.Process]) -> None:
    """Block until all are gone or zombies. Fails after 20 s."""
    deadline = time.monotonic() + 20
    while any(_is_alive(p) for p in processes):
        assert time.monotonic() < deadline, [p for p in processes if _is_alive(p)]
        psutil.wait_procs([p for p in processes if _is_alive(p)], timeout=0.05)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
