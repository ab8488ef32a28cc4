"""Hosts on one machine: namespaces with a network, a home and a temporary directory of their own, joined by a bridge.

A host is a process, its keeper, that holds a network, a mount and a UTS namespace open and waits. The machine's own
namespaces have no name of them, so the kernel removes everything with the last process inside, however the test ends.

Every host sees its own directories at the same paths, as two machines do: `home`, `tmp` and /dev/shm. What all hosts
share is the code, and the directory `shared`. The addresses are 10.77.0.N and fd77::N, N being the host's number + 1.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
Direction = Literal["in", "out", "both"]
Family = Literal["ipv4", "ipv6"]
INTERFACE = "eth0"
_BRIDGE = "hub"
_DROP = ("bpf", "da", "bytecode", "1,6 0 0 2")
"""A filter of one instruction: return TC_ACT_SHOT. Kernels without the `drop` action have it, too."""
_HOLD = """set -e
[ -z "$0" ] || echo "$0" > /proc/sys/kernel/hostname
for name in home tmp; do [ -z "$1" ] || mount --bind "$1/$name" "$2/$name"; done
[ -z "$1" ] || mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
exec cat"""


@dataclass(kw_only=True)
class Host:
    """One host. `enter` goes before a command that is to run there; the command replaces it and keeps its pid.

    `home` and `tmp` are paths inside, the same on every host; `outside` is the directory that has both, as the test
    sees them."""

    number: int
    enter: tuple[str, ...]
    home: Path
    tmp: Path
    outside: Path
    addresses: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"host-{self.number}"

    @property
    def address(self) -> str:
        """The first of its addresses."""
        return self.addresses[0]

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The variables of its commands: ours, without those of the product or of our user's directories, with our
        Python's programs first on the path."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("PS_", "XDG_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"HOME": str(self.home), "TMPDIR": str(self.tmp), "PATH": path, "NO_COLOR": "1"}
        return {**ours, **own, **(more or {})}

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 150.0,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end, in its home or the directory `cwd` of that host."""
        return subprocess.run(
            [*self.enter, "env", f"--chdir={cwd or self.home}", *command], env=self.environment(environment),
            capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def start(self, *command: str, log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command there, in its home, with its output appended to `log`; its pid is that of the command."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self.enter, "env", f"--chdir={self.home}", *command], env=self.environment(environment),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def sent_bytes(self) -> int:
        """What it has sent so far, headers of packets included."""
        shown = _call([*self.enter, "ip", "-json", "-statistics", "link", "show", "dev", INTERFACE])
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


class HostNetwork:
    """`count` hosts on one bridge; a context manager. `rate`: of each host's link in each direction, "1gbit".

    At the end processes that still run on a host keep its namespaces, not its directories: the caller ends them first.
    Raises RuntimeError, with the tool's output, where the machine cannot have hosts; see `missing`."""

    def __init__(self, count: int, *, families: Sequence[Family] = ("ipv4",), rate: str | None = None) -> None:
        self.hosts: list[Host] = []
        self.families = tuple(families)
        self._count = count
        self._rate = rate
        self._keepers: list[subprocess.Popen[str]] = []
        self._switch: tuple[str, ...] = ()

    def __enter__(self) -> HostNetwork:
        self.root = Path(tempfile.mkdtemp(prefix="psn-", dir="/tmp"))  # short: it is part of sockets' paths
        try:
            for name in ("home", "tmp", "shared"):
                (self.root / name).mkdir()
            self._switch = self._hold("")
            _call([*self._switch, "ip", "link", "add", "name", _BRIDGE, "type", "bridge"])
            _call([*self._switch, "ip", "link", "set", "dev", _BRIDGE, "up"])
            for number in range(self._count):
                self.hosts.append(self._host(number))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.kill()
            keeper.communicate()
        shutil.rmtree(self.root)

    @property
    def pids(self) -> list[int]:
        """Of the processes that hold the hosts."""
        return [keeper.pid for keeper in self._keepers]

    @property
    def shared(self) -> Path:
        """A directory that all hosts and the test see at the same path, as a shared file system."""
        return self.root / "shared"

    def cut(self, host: Host, direction: Direction) -> None:
        """Drop every packet to the host ("in"), from it ("out"), or both, without an error on either end."""
        for one in _directions(direction):
            command, interface = self._drop_point(host, one)
            _call([*command, "tc", "qdisc", "add", "dev", interface, "ingress"])
            _call([*command, "tc", "filter", "add", "dev", interface, "ingress", "protocol", "all", *_DROP])

    def heal(self, host: Host, direction: Direction = "both") -> int:
        """End the cuts of a host; returns how many packets they dropped."""
        dropped = 0
        for one in _directions(direction):
            command, interface = self._drop_point(host, one)
            shown = json.loads(_call([*command, "tc", "-json", "-statistics", "qdisc", "show", "dev", interface]))
            cuts = [qdisc for qdisc in shown if qdisc["kind"] == "ingress"]
            if cuts:
                dropped += int(cuts[0]["drops"])
                _call([*command, "tc", "qdisc", "del", "dev", interface, "ingress"])
        return dropped

    def change_address(self, host: Host, number: int) -> None:
        """Give the host the addresses of another number in place of its own."""
        _call([*host.enter, "ip", "address", "flush", "dev", INTERFACE, "scope", "global"])
        self._address(host, number)

    def _host(self, number: int) -> Host:
        outside = self.root / f"host-{number}"
        for name in ("home", "tmp"):
            (outside / name).mkdir(parents=True)
        enter = self._hold(f"host-{number}", outside)
        host = Host(number=number, enter=enter, home=self.root / "home", tmp=self.root / "tmp", outside=outside)
        port = f"port{number}"
        ends = ["name", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(self._keepers[-1].pid)]
        _call([*self._switch, "ip", "link", "add", *ends])
        _call([*self._switch, "ip", "link", "set", "dev", port, "master", _BRIDGE, "up"])
        _call([*host.enter, "ip", "link", "set", "dev", INTERFACE, "up"])
        self._address(host, number)
        if self._rate:
            for command, interface in ((host.enter, INTERFACE), (self._switch, port)):
                shape = ["rate", self._rate, "burst", "128kb", "latency", "50ms"]
                _call([*command, "tc", "qdisc", "add", "dev", interface, "root", "tbf", *shape])
        return host

    def _address(self, host: Host, number: int) -> None:
        host.addresses = []
        for family in self.families:
            address, bits = (f"10.77.0.{number + 1}", 24) if family == "ipv4" else (f"fd77::{number + 1:x}", 64)
            nodad = [] if family == "ipv4" else ["nodad"]
            _call([*host.enter, "ip", "address", "add", f"{address}/{bits}", "dev", INTERFACE, *nodad])
            host.addresses.append(address)

    def _drop_point(self, host: Host, direction: Direction) -> tuple[tuple[str, ...], str]:
        """Where packets of a direction arrive: at the host, or at the bridge."""
        return (host.enter, INTERFACE) if direction == "in" else (self._switch, f"port{host.number}")

    def _hold(self, hostname: str, outside: Path | None = None) -> tuple[str, ...]:
        """A keeper, which ends with its input, that is, with us; the words that enter its namespaces."""
        keeper = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "--", "sh", "-c", _HOLD, hostname,
             str(outside or ""), str(self.root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._keepers.append(keeper)
        assert keeper.stdout is not None and keeper.stderr is not None
        if keeper.stdout.readline().strip() != "ready":
            raise RuntimeError(f"no namespaces: {keeper.stderr.read().strip()}")
        return ("nsenter", f"--target={keeper.pid}", "--net", "--mount", "--uts", "--")


@functools.cache
def missing() -> str:
    """Why this machine cannot have hosts; empty when it can."""
    if os.geteuid() != 0:
        return "hosts need root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"hosts need {', '.join(absent)}"
    try:
        with HostNetwork(1, rate="1gbit") as network:
            network.cut(network.hosts[0], "both")
            return ""
    except RuntimeError as error:
        return str(error)


def _directions(direction: Direction) -> tuple[Direction, ...]:
    return ("in", "out") if direction == "both" else (direction,)


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
