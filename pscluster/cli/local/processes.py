"""The daemons of a local cluster: their command lines; starting, finding and ending them; why one ended.

A process belongs to the cluster only if its user and its command line match.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from pscluster.cli.local.record import Daemon
from pscluster.errors import PsError, StorageError, UnhealthyError, from_dict

GRACE_S = 10.0
_KILL_WAIT_S = 5.0
_ORPHAN_GRACE_S = 1.0
_POLL_S = 0.02
_CLOCK_SLACK_S = 2.0
_LOG_CAP_BYTES = 16 << 20
MODULE = {"master": "psmaster.daemon", "worker": "psworker.daemon", "server": "psserver.daemon"}
WORKER_SLOTS = 1
"""A local worker runs one trainer at a time: a local cluster scales by workers."""
SERVER_SLOTS = 16
"""A partition of a small job costs little, so a local server runs many."""
_NAMED = re.compile(r"^(PS-\d{4}): (.*?)(?: \(([^()]*(?:\([^()]*\)[^()]*)*)\))?$")
_LINES = 8
_TAIL_BYTES = 16 << 10


def start(name: str, command: Sequence[str], variables: Mapping[str, str], directory: Path, log: Path) -> Daemon:
    """Start one daemon in a session of its own, its output appended to `log`. Returns at once."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > _LOG_CAP_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as sink:
            process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                env={**os.environ, **variables},
            )
    except OSError as error:
        raise StorageError(f"cannot start {name}: {error}") from None
    return Daemon(name=name, pid=process.pid, created_s=psutil.Process(process.pid).create_time())


def is_alive(daemon: Daemon, state_dir: Path) -> bool:
    """Whether that process still runs (a zombie does not)."""
    return _process_of(daemon, state_dir) is not None


def find(state_dir: Path) -> tuple[Daemon, ...]:
    """Every running daemon of this state directory, recorded or not, by looking at this user's processes."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            name = name_of(process.cmdline(), state_dir)
            if name is not None:
                found.append(Daemon(name=name, pid=process.pid, created_s=process.create_time()))
        except psutil.Error:
            continue  # it has ended meanwhile, or may not be inspected
    return tuple(sorted(found, key=lambda daemon: daemon.name))


def end(daemons: Sequence[Daemon], state_dir: Path, grace_s: float = GRACE_S) -> list[str]:
    """End daemons and whatever they started: SIGTERM, then SIGKILL after `grace_s`. Blocks until they are gone; returns
    the names of those killed. A pid that now belongs to another process is left alone."""
    processes = {d.name: process for d in daemons if (process := _process_of(d, state_dir)) is not None}
    # Listed before the parents end: afterwards their parent is unknown.
    children: list[psutil.Process] = []
    for process in processes.values():
        with suppress(psutil.Error):
            children += process.children(recursive=True)
    _signal(processes.values(), signal.SIGTERM)
    left = _await_end(list(processes.values()), grace_s)
    _signal(left, signal.SIGKILL)
    orphans = _await_end(children, _ORPHAN_GRACE_S)
    _signal(orphans, signal.SIGKILL)
    _await_end([*left, *orphans], _KILL_WAIT_S)
    return sorted(name for name, process in processes.items() if process in left)


def _process_of(daemon: Daemon, state_dir: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(daemon.pid)
        same_start = abs(process.create_time() - daemon.created_s) < _CLOCK_SLACK_S
        if not same_start or process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process if name_of(process.cmdline(), state_dir) == daemon.name else None
    except psutil.Error:
        return None


def _await_end(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until all have ended; returns those that have not. A zombie that is not reaped has ended."""
    deadline = time.monotonic() + timeout_s
    while True:
        processes = [process for process in processes if not _has_ended(process)]
        if not processes or time.monotonic() >= deadline:
            return processes
        time.sleep(_POLL_S)


def _has_ended(process: psutil.Process) -> bool:
    try:
        with suppress(psutil.TimeoutExpired):
            process.wait(timeout=0)  # reaps it when it is a child of this process
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):  # already gone
            process.send_signal(number)


def node_names(workers: int, servers: int) -> tuple[str, ...]:
    """The nodes of a cluster of that size."""
    return tuple([f"worker-{n}" for n in range(workers)] + [f"server-{n}" for n in range(servers)])


def count_of(names: Iterable[str], role: str) -> int:
    """How many nodes of a role are among `names`, by the highest number: gaps are nodes that were lost."""
    numbers = [name.partition("-")[2] for name in names if name.startswith(f"{role}-")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def daemon_dir(name: str, state_dir: Path) -> Path:
    return state_dir / name


def command(name: str, state_dir: Path, address: str, token_file: Path) -> list[str]:
    """The command line of one daemon. -P: its working directory is not searched for modules."""
    role = name.partition("-")[0]
    words = [sys.executable, "-P", "-m", MODULE[role], "--state-dir", str(daemon_dir(name, state_dir))]
    words += ["--token-file", str(token_file), "--metrics-listen", "127.0.0.1:0"]
    if role == "master":
        return [*words, "--listen", address]
    slots = WORKER_SLOTS if role == "worker" else SERVER_SLOTS
    return [*words, "--node-id", name, "--master", address, "--slots", str(slots)]


def variables(name: str, devices: Sequence[str]) -> dict[str, str]:
    """Variables that a daemon gets in addition to this environment. `devices`: the machine's CUDA devices, as named in
    CUDA_VISIBLE_DEVICES: worker n gets the n-th, and workers beyond the last get none, so that no two share one."""
    role, _, number = name.partition("-")
    own = {"PYTHONUNBUFFERED": "1"}
    if role == "worker" and devices:
        own["CUDA_VISIBLE_DEVICES"] = devices[int(number)] if int(number) < len(devices) else ""
    return own


def name_of(command_line: Sequence[str], state_dir: Path) -> str | None:
    """Which daemon of this state directory has that command line; None: none."""
    try:
        module = command_line[command_line.index("-m") + 1]
        directory = Path(command_line[command_line.index("--state-dir") + 1])
    except (ValueError, IndexError):
        return None
    name = directory.name
    matches = directory == daemon_dir(name, state_dir)
    return name if matches and module == MODULE.get(name.partition("-")[0]) else None


def exit_error(name: str, log: Path, offset: int) -> PsError:
    """The error that the daemon printed after `offset`, else one that shows its last lines."""
    lines = _last_lines(log, offset)
    for line in reversed(lines):
        match = _NAMED.match(line.strip())
        if match:
            code, cause, action = match.groups()
            cause = f"{name} could not start: {cause}"
            return from_dict({"code": code, "cause": cause, "action": action or f"see {log}"})
    shown = "\n  ".join(lines[-_LINES:]) or "(no output)"
    return UnhealthyError(f"{name} ended while starting; its last output:\n  {shown}", action=f"see {log}")


def _last_lines(log: Path, offset: int) -> list[str]:
    try:
        with log.open("rb") as source:
            end = source.seek(0, 2)
            source.seek(max(offset if offset <= end else 0, end - _TAIL_BYTES))
            text = source.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]
