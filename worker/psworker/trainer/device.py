"""Whether torch can compute where the agent, which counts devices and loads no torch, sent a trainer."""

from __future__ import annotations

import sys

import torch

from pscluster.devices import AUTO, CPU
from pscluster.errors import DeviceError


def usable_device(chosen: str, wanted: str) -> str:
    """`chosen`, when torch has it. Else the CPU if the job said "auto" (stderr tells why), or raises DeviceError.

    `chosen` is "cpu", "cuda:N", or empty for the CPU; `wanted` is the spec's `workers.device`. Initialises nothing.
    """
    if chosen in ("", CPU):
        return CPU
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = [f"cuda:{index}" for index in range(count)]
    if chosen in there:
        return chosen
    cause = f"the agent counts {chosen} here, but torch {torch.__version__} sees {', '.join(there) or 'no CUDA device'}"
    if wanted != AUTO:
        raise DeviceError(cause, action="install a torch that fits the node's driver, or set workers.device: cpu")
    print(f"{cause}; computes on the CPU", file=sys.stderr)
    return CPU
