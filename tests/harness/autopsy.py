"""Record the state of a cluster that makes no progress, before it is taken down."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from harness.cluster import LocalCluster
from harness.faults import Victim, victims

_TAIL_BYTES = 200_000
_LOOK_S = 20.0
_OF_PROC = ("status", "wchan", "stack", "syscall", "limits")


def write_down(cluster: LocalCluster, directory: Path) -> Path:
    """Write to `directory` what psctl reports of the newest job, the ends of all logs, and the state of every process:
    threads, files, what it waits for, and Python's stacks by py-spy. Return the directory. What cannot be read is
    replaced by the error."""
    directory.mkdir(parents=True, exist_ok=True)
    jobs = sorted((cluster.state_dir / "master" / "jobs").glob("*"), key=lambda path: path.stat().st_ctime)
    job = jobs[-1].name if jobs else "none"
    for name, arguments in _questions(job).items():
        _write(directory / name, lambda arguments=arguments: _ask(cluster, *arguments))  # type: ignore[misc]
    for log in sorted((cluster.state_dir / "logs").glob("*.log")):
        _write(directory / f"log-{log.name}", lambda log=log: _tail(log))  # type: ignore[misc]
    for log in sorted((cluster.state_dir / "master" / "jobs" / job).rglob("*.*")):
        if log.suffix in (".log", ".jsonl"):
            _write(directory / f"job-{log.name}", lambda log=log: _tail(log))  # type: ignore[misc]
    _write(directory / "store.txt", lambda: _listing(cluster.state_dir / "master" / "jobs" / job))
    for victim in victims(cluster):
        name = f"process-{victim.process.pid}-{victim.name.replace(' ', '-')}.txt"
        _write(directory / name, lambda victim=victim: _state_of(victim))  # type: ignore[misc]
    return directory


def _questions(job: str) -> dict[str, tuple[str, ...]]:
    return {
        "describe.txt": ("describe", job),
        "describe.json": ("describe", job, "-o", "json"),
        "nodes.json": ("nodes", "-o", "json"),
        "snapshots.json": ("snapshots", job, "-o", "json"),
    }


def _ask(cluster: LocalCluster, *arguments: str) -> str:
    done = cluster.psctl(*arguments, expect=None)
    return done.stdout + done.stderr


def _write(path: Path, look: Callable[[], str]) -> None:
    try:
        path.write_text(look())
    except (OSError, psutil.Error, subprocess.SubprocessError) as error:
        path.write_text(f"could not be read: {error}\n")


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace")


def _listing(directory: Path) -> str:
    return "\n".join(f"{path.stat().st_size:>12} {path}" for path in sorted(directory.rglob("*")) if path.is_file())


def _state_of(victim: Victim) -> str:
    pid = victim.process.pid
    parts = [f"{victim.name}: {' '.join(victim.process.cmdline())}"]
    parts += [f"---- {name}\n{_of_proc(Path('/proc') / str(pid) / name)}" for name in _OF_PROC]
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        parts.append(f"thread {task.name}: {_of_proc(task / 'comm').strip()}: {_of_proc(task / 'wchan')}")
    parts.append("---- files\n" + "\n".join(_link(path) for path in sorted(Path(f"/proc/{pid}/fd").iterdir())))
    parts.append(f"---- Python\n{_python_stacks(pid)}")
    return "\n".join(parts) + "\n"


def _of_proc(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        return f"({error.strerror})"


def _link(path: Path) -> str:
    try:
        return f"{path.name} -> {path.readlink()}"
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def _python_stacks(pid: int) -> str:
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        return "py-spy is not installed"
    command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LOOK_S, check=False)
    return done.stdout + done.stderr
