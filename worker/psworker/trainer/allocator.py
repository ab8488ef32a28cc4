"""How this process keeps the memory that activations and gradients are made of."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MIB = 1 << 20


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
