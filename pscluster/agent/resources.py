"""What this node has, as it tells the master. Imports no torch: devices are counted, not initialised."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from pscluster.agent import cgroup
from pscluster.v1.agents_pb2 import Resources

_NVIDIA = Path("/proc/driver/nvidia/gpus")


def measure(slots: int, devices: Sequence[str]) -> Resources:
    """Cores this process may use, memory installed or allowed, and the slots and CUDA devices given."""
    installed = int(psutil.virtual_memory().total)
    return Resources(
        cpu_cores=len(os.sched_getaffinity(0)),
        memory_bytes=min(installed, cgroup.memory_limit_bytes() or installed),
        devices=devices,
        slots=slots,
    )


def memory_available_bytes() -> int:
    """What could be allocated on this node now, by the kernel's estimate."""
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
