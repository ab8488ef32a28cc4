"""Which daemons a local cluster is made of and what each is started with. Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_MODULE = {
    "master": "psmaster.daemon",
    "worker": "psworker.daemon",
    "server": "psserver.daemon",
}
WORKER_SLOTS = 1
"""A local worker runs one trainer at a time: more workers, not more trainers, is how one scales here."""
SERVER_SLOTS = 16
"""A partition of a small job costs little: any number of partitions fits on any number of local servers."""


def node_names(workers: int, servers: int) -> tuple[str, ...]:
    """The nodes of a cluster of that size."""
    return tuple([f"worker-{n}" for n in range(workers)] + [f"server-{n}" for n in range(servers)])


def count_of(names: Iterable[str], role: str) -> int:
    """How many nodes of a role a cluster with these has, counted by the highest number: gaps are nodes that died."""
    numbers = [name.partition("-")[2] for name in names if name.startswith(f"{role}-")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def daemon_dir(name: str, state_dir: Path) -> Path:
    """A daemon's own directory."""
    return state_dir / name


def command(name: str, state_dir: Path, address: str, token_file: Path) -> list[str]:
    """The command line of one daemon. -P: the directory it is started from is not searched for modules."""
    role = name.partition("-")[0]
    words = [sys.executable, "-P", "-m", _MODULE[role], "--state-dir", str(daemon_dir(name, state_dir))]
    words += ["--token-file", str(token_file), "--metrics-listen", "127.0.0.1:0"]
    if role == "master":
        return [*words, "--listen", address]
    slots = WORKER_SLOTS if role == "worker" else SERVER_SLOTS
    return [*words, "--node-id", name, "--master", address, "--slots", str(slots)]


def variables(name: str, devices: Sequence[str]) -> dict[str, str]:
    """What a daemon's environment has beside ours. `devices`: the machine's CUDA devices, as CUDA_VISIBLE_DEVICES names
    them: worker n gets the n-th, those beyond the last get none, so that no two share one."""
    role, _, number = name.partition("-")
    own = {"PYTHONUNBUFFERED": "1"}
    if role == "worker" and devices:
        own["CUDA_VISIBLE_DEVICES"] = devices[int(number)] if int(number) < len(devices) else ""
    return own


def name_of(command_line: Sequence[str], state_dir: Path) -> str | None:
    """Which daemon of this state directory a process with that command line is; None: none of ours."""
    try:
        module = command_line[command_line.index("-m") + 1]
        directory = Path(command_line[command_line.index("--state-dir") + 1])
    except (ValueError, IndexError):
        return None
    name = directory.name
    ours = directory == daemon_dir(name, state_dir)
    return name if ours and module == _MODULE.get(name.partition("-")[0]) else None
