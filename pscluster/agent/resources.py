"""What this node has: cores, memory, CUDA devices, and which process holds which device. Imports no torch.

Memory limits and out-of-memory kills are read from the control group of this process, in either hierarchy, also in a
container that shows its own group at the root. Without one, there is no limit, and the kills are the machine's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from pscluster.devices import choose_device
from pscluster.v1.agents_pb2 import Resources

_NVIDIA = Path("/proc/driver/nvidia/gpus")
_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60


def measure(slots: int, devices: Sequence[str]) -> Resources:
    """Cores this process may use, memory installed or allowed, and the slots and CUDA devices given."""
    installed = int(psutil.virtual_memory().total)
    return Resources(
        cpu_cores=len(os.sched_getaffinity(0)),
        memory_bytes=min(installed, memory_limit_bytes() or installed),
        devices=devices,
        slots=slots,
    )


def memory_available_bytes() -> int:
    """The memory that can still be allocated on this node, by the kernel's estimate."""
    return int(psutil.virtual_memory().available)


def cuda_devices(environ: Mapping[str, str], directory: Path = _NVIDIA) -> list[str]:
    """["cuda:0", ...]: what the driver lists, less what CUDA_VISIBLE_DEVICES hides."""
    return [f"cuda:{index}" for index in range(len(visible_devices(environ, directory)))]


def visible_devices(environ: Mapping[str, str], directory: Path = _NVIDIA) -> list[str]:
    """The CUDA devices that a process with this environment sees, as CUDA_VISIBLE_DEVICES names them."""
    try:
        present = [str(index) for index, _ in enumerate(directory.iterdir())]
    except OSError:
        present = []
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [part.strip() for part in visible.split(",") if part.strip() and not part.strip().startswith("-")]
    return named[: len(present)]


def memory_limit_bytes(proc: Path = Path("/proc"), root: Path = _ROOT) -> int | None:
    """The group's memory limit in bytes; None: it has none."""
    for group, version in _groups(proc, root):
        text = _read(group / ("memory.max" if version == 2 else "memory.limit_in_bytes")).strip()
        if text.isdecimal() and int(text) < _UNLIMITED_BYTES:
            return int(text)
    return None


def oom_kills(proc: Path = Path("/proc"), root: Path = _ROOT) -> int:
    """How many processes of the group, else of the machine, the kernel has killed for lack of memory."""
    for group, version in _groups(proc, root):
        count = _field(_read(group / ("memory.events" if version == 2 else "memory.oom_control")), "oom_kill")
        if count is not None:
            return count
    return _field(_read(proc / "vmstat"), "oom_kill") or 0


def _groups(proc: Path, root: Path) -> list[tuple[Path, int]]:
    """Candidate directories of this process's group, most specific first, each with its hierarchy's version."""
    found: list[tuple[Path, int]] = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            found += [(root / inside, 2), (root, 2)]
        elif "memory" in controllers.split(","):
            found = [(root / "memory" / inside, 1), (root / "memory", 1), *found]
    return found


def _field(text: str, name: str) -> int | None:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return None


def _read(path: Path) -> str:
    """The file's text; empty when there is no such file."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


class DeviceLedger:
    """Which process holds which device: no two share one. Used from the agent's loop."""

    def __init__(self, present: Sequence[str]) -> None:
        """`present`: the node's CUDA devices, in the order in which they are assigned."""
        self._present = tuple(present)
        self._held: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._released = asyncio.Event()

    async def claim(self, process_id: str, wanted: str) -> str:
        """A device for a process, which holds it until `release`. Raises DeviceError. Waits while all that fit are held
        and a holder is being ended: a job that preempts another starts before the last process of the other has
        exited."""
        while (device := self._choose(wanted)) is None:
            await self._released.wait()
        self._held[process_id] = device
        return device

    def leaving(self, process_id: str) -> None:
        """The process is being ended, and its device will be free soon. Safe to repeat."""
        if process_id in self._held:
            self._leaving.add(process_id)

    def release(self, process_id: str) -> None:
        """The process has exited. Safe to repeat."""
        self._held.pop(process_id, None)
        self._leaving.discard(process_id)
        self._released.set()
        self._released = asyncio.Event()  # later waiters wait for the next release

    def _choose(self, wanted: str) -> str | None:
        leaving = {self._held[process_id] for process_id in self._leaving}
        held = set(self._held.values()) - leaving
        return choose_device(wanted, self._present, held, leaving)
