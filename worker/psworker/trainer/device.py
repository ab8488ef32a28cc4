"""What a trainer computes on: its device, and how the process keeps the memory of activations and gradients."""

from __future__ import annotations

import ctypes
import sys

import torch

from pscluster.devices import AUTO, CPU
from pscluster.errors import DeviceError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MIB = 1 << 20


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


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed instead of handing it back to the kernel; False where the C library cannot.

    Every microbatch allocates the same tensors again. By default glibc takes big ones fresh from the kernel each time,
    which then zeroes them page by page: about 5 % of a small step on a CPU. The price is that the process stays as
    large as its largest moment."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    if not libc.mallopt(_M_MMAP_THRESHOLD, 1024 * _MIB) and not libc.mallopt(_M_MMAP_THRESHOLD, 32 * _MIB):
        return False  # an older glibc takes 32 MiB at the most
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(_M_TOP_PAD, 64 * _MIB))
