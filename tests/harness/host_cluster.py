"""A secured cluster over several hosts: the master on host 0, a worker and a server on each of the others.

Everything is set up as a user does it, by commands on the hosts; nothing of the hosts' disks is shared. The test itself
speaks to the master over its Unix socket, as somebody on the master's host does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from harness.cluster import DEADLINE_S, PSCTL, LocalCluster, wait_gone
from harness.hosts import Family, Host, HostNetwork
from pscluster.client import Cluster as Client
from pscluster.errors import UnreachableError
from pscluster.settings import runtime_dir

PORT = 7070
READY_S = 60.0
_MODULE = {"master": "psmaster.daemon", "worker": "psworker.daemon", "server": "psserver.daemon"}


class HostCluster(LocalCluster):
    """Create it with `host_cluster`, which ends it and checks what is left. "worker-0" and "server-0" are on host 1.

    `state_dir` is the master's host's, as the test sees it; `self.network.shared` has the same path on every host."""

    def __init__(self, network: HostNetwork, master_flags: Sequence[str] = ()) -> None:
        self._master = network.hosts[0]
        super().__init__(self._master.outside / "home" / "pscluster")
        self.network = network
        self._master_flags = master_flags
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._tokens: dict[str, str] = {}
        self.user_host = network.hosts[-1]
        """Where `psctl` runs, in a context of its own."""
        self.is_admin = False
        """`psctl` runs on the master's host with the token there: the user's certificate may have expired."""

    # ---- places ----

    @property
    def names(self) -> list[str]:
        """Of all daemons."""
        nodes = [f"{role}-{number}" for role in ("worker", "server") for number in range(len(self.network.hosts) - 1)]
        return ["master", *nodes]

    def host_of(self, name: str) -> Host:
        """Where a daemon runs."""
        return self.network.hosts[0 if name == "master" else 1 + int(name.partition("-")[2])]

    def daemon_dir(self, name: str) -> Path:
        """A daemon's state directory, as the test sees it."""
        return self.host_of(name).outside / "home" / "pscluster" / name

    def directories_of(self, name: str) -> list[Path]:
        runtime = runtime_dir(self._master.home / "pscluster" / name).name
        return [self.host_of(name).outside / "tmp" / runtime, self.daemon_dir(name) / "jobs"]

    @property
    def shared(self) -> Path:
        return self.network.shared

    @property
    def address(self) -> str:
        """Where the master takes members."""
        return f"{_literal(self._master.address)}:{PORT}"

    @property
    def _socket(self) -> Path:
        """Where the master's own host speaks to it, beside the admin's token."""
        return self._master.home / "pscluster" / "master" / "master.sock"

    # ---- psctl ----

    def psctl(
        self, *arguments: str, expect: int | None = 0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run psctl on the user's host. `cwd` must be below `shared`."""
        host = self._master if self.is_admin else self.user_host
        return self.psctl_on(host, *arguments, expect=expect, cwd=cwd, local=self.is_admin)

    def psctl_on(
        self, host: Host, *arguments: str, expect: int | None = 0, cwd: Path | None = None, local: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run psctl on a host; `local`: with the token of the master's host."""
        token = {"PS_ADDRESS": f"unix:{self._socket}", "PS_TOKEN_FILE": str(self._socket.with_name("token"))}
        done = host.run(
            PSCTL, *arguments, environment=token if local else None, timeout_s=DEADLINE_S + 30, cwd=cwd or host.home
        )
        if expect is not None:
            assert done.returncode == expect, f"psctl {arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        host = self.user_host
        command = [*host.enter, "env", f"--chdir={cwd or host.home}", PSCTL, *arguments]
        return subprocess.Popen(
            command, env=host.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def client(self) -> Client:
        return Client.connect(
            address=f"unix:{self.daemon_dir('master') / 'master.sock'}",
            token=(self.daemon_dir("master") / "token").read_text().strip(),
        )

    # ---- daemons ----

    def up(self, workers: int = 0, servers: int = 0) -> None:
        """Secure the cluster, start its daemons, a worker and a server on each host but the master's, and wait until
        all are ready."""
        assert {workers, servers} <= {0, len(self.network.hosts) - 1}, "a worker and a server on each host"
        for host in self.network.hosts:
            (host.outside / "home" / "pscluster").mkdir(mode=0o700)
        (self.state_dir / "logs").mkdir()
        self.psctl_on(self._master, "certs", "init", "--state-dir", str(self._socket.parent))
        self.start_daemon("master")
        for role in ("worker", "server", "user"):
            self._tokens[role] = self.make_token(role)
        for name in self.names[1:]:
            self.start_daemon(name)
        self.psctl("context", "add", "lab", "--join", self._tokens["user"], "--user", "tester")
        self.psctl("context", "use", "lab")
        self.wait_ready()

    def make_token(self, role: str) -> str:
        """A join token, made on the master's host as soon as the master answers."""
        deadline = time.monotonic() + READY_S
        words = ("token", "create", "--role", role, "--ttl", "1h")
        while (done := self.psctl_on(self._master, *words, expect=None, local=True)).returncode:
            assert time.monotonic() < deadline and self.runs("master"), f"{done.stderr}\n{self.log_end('master')}"
        return done.stdout.strip()

    def start_daemon(self, name: str) -> None:
        """Start one daemon, again if it has ended; returns at once."""
        host = self.host_of(name)
        words = [sys.executable, "-P", "-m", _MODULE[name.partition("-")[0]]]
        words += ["--state-dir", str(host.home / "pscluster" / name)]
        self._started[name] = host.start(*words, *self._flags(name, host), log=self.state_dir / "logs" / f"{name}.log")

    def _flags(self, name: str, host: Host) -> list[str]:
        if name == "master":
            listen = ["--listen", f"unix:{self._socket}", "--listen", self.address]
            return [*listen, "--token-file", str(self._socket.with_name("token")), *self._master_flags]
        role = name.partition("-")[0]
        # A token in a file of its own, as a unit file names it: a command line is public.
        token = host.outside / "home" / "pscluster" / f"{role}.join"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(self._tokens[role])
        own = ["--own-store", "--slots", "4"] if role == "server" else ["--slots", "1"]
        return ["--node-id", name, "--join", f"@{host.home / 'pscluster' / token.name}", *own]

    def wait_ready(self) -> None:
        """Block until the master answers and every node is ready."""
        deadline = time.monotonic() + READY_S
        while silent := self._silent_nodes():
            assert time.monotonic() < deadline, f"{silent} are not ready: {self.log_end(silent[0])}"
            ended = [name for name in silent if not self.runs(name)]
            assert not ended, f"{ended} ended: {self.log_end(ended[0])}"
            time.sleep(0.05)
        self.note_processes()

    def _silent_nodes(self) -> list[str]:
        """The nodes that are not ready; the master when it does not answer."""
        try:
            with self.client() as client:
                return sorted(set(self.names[1:]) - {node.node_id for node in client.nodes() if node.ready})
        except UnreachableError:
            return ["master"]

    def log_end(self, name: str) -> str:
        return (self.state_dir / "logs" / f"{name}.log").read_text()[-3000:]

    def daemons(self) -> dict[str, psutil.Process]:
        found = {}
        for name, process in self._started.items():
            process.poll()  # collects one that has ended
            with suppress(psutil.NoSuchProcess):
                found[name] = psutil.Process(process.pid)
        return found

    def daemon(self, name: str) -> psutil.Process:
        return self.daemons()[name]

    def runs(self, name: str) -> bool:
        return self._started[name].poll() is None

    def down(self) -> None:
        """End all daemons, agents first, as a service manager does. Fails when one does not end by itself."""
        self.note_processes()
        killed = []
        for group in (self.names[1:], ["master"]):
            running = {name: self._started[name] for name in group if name in self._started and self.runs(name)}
            for process in running.values():
                process.send_signal(signal.SIGTERM)
            for name, process in running.items():
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    killed.append(name)
        for found in self.seen.values():
            with suppress(psutil.NoSuchProcess):
                found.wait(10)
        assert not killed, f"{killed} did not end at SIGTERM: {self.log_end(killed[0])}"

    def remaining(self) -> list[str]:
        alive = [p for p in self.seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        found = [f"process {p.pid} {' '.join(p.cmdline())}" for p in alive]
        for host in self.network.hosts:
            found += [str(path) for path in (host.outside / "tmp").iterdir()]
            found += [str(path) for path in host.outside.rglob(".*.writing")]
        return found

    # ---- faults ----

    def kill_host(self, number: int) -> None:
        """Kill every process of a host's daemons at once, as a power loss does."""
        names = [name for name in self.names if self.host_of(name).number == number]
        daemons = self.daemons()
        victims = [p for name in names if name in daemons for p in (daemons[name], *daemons[name].children())]
        for victim in victims:
            victim.kill()
        wait_gone(victims)

    def certificates(self, name: str) -> str:
        """The certificate that an agent has on its disk, as PEM."""
        return (self.daemon_dir(name) / "identity" / "certificate.pem").read_text()


@contextmanager
def host_cluster(
    nodes: int, *, families: Sequence[Family] = ("ipv4",), master_flags: Sequence[str] = ()
) -> Iterator[HostCluster]:
    """A running cluster of a master's host and `nodes` hosts more. It is ended, and nothing of it may be left."""
    with HostNetwork(nodes + 1, families=families) as network:
        cluster = HostCluster(network, master_flags)
        try:
            cluster.up()
            yield cluster
        finally:
            for host in network.hosts:
                network.heal(host)
            cluster.down()
        assert cluster.remaining() == []


def _literal(address: str) -> str:
    return f"[{address}]" if ":" in address else address
