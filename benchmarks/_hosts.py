"""Two hosts on one machine with a slow link between them: network and mount namespaces, a veth pair, and `tc`.

A host is a process that keeps its namespaces open and waits. The machine's own namespaces have no name of them, so the
kernel removes everything with the last process inside, however this one ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
LINK_RATE = "1gbit"
_NETWORK = "10.77.0"
# What is bound in this directory exists on this host only: "auto" takes a Unix socket that it sees for a local one.
_HOLD = 'mount -t tmpfs tmpfs "$0" && echo ready && exec cat'


@dataclass(frozen=True, kw_only=True)
class Host:
    """One end of the cable. `enter` goes before a command that is to run there; `sockets` is a directory whose content
    no other host sees."""

    address: str
    interface: str
    sockets: Path
    enter: Sequence[str]

    def sent_bytes(self) -> int:
        """What went into the cable here so far, headers of packets included."""
        shown = _call([*self.enter, "ip", "-json", "-statistics", "link", "show", "dev", self.interface])
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


def missing() -> str:
    """Why this machine cannot have `joined` hosts; empty when it can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"needs {', '.join(absent)}"
    try:
        with tempfile.TemporaryDirectory(prefix="psb-") as directory, joined(Path(directory)):
            return ""
    except RuntimeError as error:
        return str(error)


@contextmanager
def joined(directory: Path) -> Iterator[list[Host]]:
    """Two hosts, below an empty directory, with `LINK_RATE` between them in each direction; gone at the end.

    Raises RuntimeError, with the tool's output, where namespaces or `tc` are not available."""
    keepers: list[subprocess.Popen[str]] = []
    try:
        hosts = []
        for number in range(2):
            sockets = directory / f"host-{number}"
            sockets.mkdir()
            keepers.append(_hold(sockets))
            hosts.append(
                Host(
                    address=f"{_NETWORK}.{number + 1}",
                    interface=f"psb{os.getpid()}",
                    sockets=sockets,
                    enter=("nsenter", f"--target={keepers[-1].pid}", "--net", "--mount", "--"),
                )
            )
        _join(hosts, keepers[1].pid)
        yield hosts
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()


def _hold(sockets: Path) -> subprocess.Popen[str]:
    """A process in namespaces of its own that ends with its input, that is, with us."""
    keeper = subprocess.Popen(
        ["unshare", "--net", "--mount", "--", "sh", "-c", _HOLD, str(sockets)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert keeper.stdout is not None and keeper.stderr is not None
    if keeper.stdout.readline().strip() != "ready":
        raise RuntimeError(f"no namespaces: {keeper.stderr.read().strip()}")
    return keeper


def _join(hosts: Sequence[Host], other_pid: int) -> None:
    """The cable: made inside, never seen outside."""
    first, second = hosts
    ends = ["name", first.interface, "type", "veth", "peer", "name", second.interface, "netns", str(other_pid)]
    _call([*first.enter, "ip", "link", "add", *ends])
    for host in hosts:
        for words in (
            ["ip", "link", "set", "lo", "up"],
            ["ip", "address", "add", f"{host.address}/24", "dev", host.interface],
            ["ip", "link", "set", host.interface, "up"],
            ["tc", "qdisc", "add", "dev", host.interface, "root", "tbf",
             "rate", LINK_RATE, "burst", "128kb", "latency", "50ms"],
        ):  # fmt: skip
            _call([*host.enter, *words])


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
