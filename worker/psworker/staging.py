"""What a trainer computes on, and what moves between it and host memory: gradients out, values in.

On the CPU both are the same memory or one copy away. A CUDA device copies on streams of its own, behind backward and
before forward, from and to pinned memory; a thread waits for what was copied out and sends it."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

import torch

from pscluster.agent.resources import memory_available_bytes, memory_limit_bytes
from pscluster.devices import AUTO, CPU
from pscluster.errors import DeviceError, InternalError

_READ_WRITE = 0  # cudaHostRegisterDefault, driver_types.h


class Staging:
    """The model is in host memory. Used by the thread that runs forward and backward, unless said otherwise."""

    is_host = True
    """Gradients lie in host memory already, and may be sent from where they are."""

    def pin(self, memory: torch.Tensor) -> None:
        """Make copies to and from this host memory fast, while it is mapped. From any thread; may do nothing."""

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy a gradient to host memory. `target` is complete when what follows in `after` is called."""
        target.copy_(source)

    def after(self, call: Callable[[], None], kept: object) -> None:  # noqa: ARG002 - nothing is under way
        """Have `call` run when all that was copied out is there, in order, soon; until then `kept` is kept alive."""
        call()

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy values from host memory to where the model is; what is computed from now on sees them. In host memory
        both are the same."""

    def close(self) -> None:
        """End what is begun; blocks briefly."""


class CudaStaging(Staging):
    """The model is on a CUDA device. `cuda` is torch.cuda, or what a test puts in its place."""

    is_host = False

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._device = device
        self._out = cuda.Stream(device)
        self._in = cuda.Stream(device)
        self._waiting: Queue[tuple[Any, Callable[[], None], object] | None] = Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._send_copied, name="staging", daemon=True)
        self._thread.start()

    def pin(self, memory: torch.Tensor) -> None:
        if memory.numel():  # where the driver refuses, copies are slower, and as correct
            self._cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _READ_WRITE)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._out.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._out):
            target.copy_(source, non_blocking=True)

    def after(self, call: Callable[[], None], kept: object) -> None:
        if self._error is not None:
            raise InternalError(f"gradients could not be copied from {self._device}: {self._error!r}")
        event = self._cuda.Event()
        event.record(self._out)
        self._waiting.put((event, call, kept))

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> None:
        computing = self._cuda.current_stream(self._device)
        self._in.wait_stream(computing)  # what still reads the old values
        with self._cuda.stream(self._in):
            target.copy_(source, non_blocking=True)
        computing.wait_stream(self._in)

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(timeout=10)

    def _send_copied(self) -> None:
        while (item := self._waiting.get()) is not None:
            event, call, _ = item
            try:
                event.synchronize()
                call()
            except BaseException as error:  # raised by the next `after`, on the thread that computes
                self._error = error


def staging_for(device: str) -> Staging:
    """What a trainer on this device uses."""
    return Staging() if device == "cpu" else CudaStaging(torch.device(device))


# ---- the device, and the memory of activations and gradients ----


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MIB = 1 << 20


def usable_device(chosen: str, wanted: str) -> str:
    """`chosen`, when torch has it. Else the CPU if the job said "auto" (stderr tells why), or raises DeviceError.

    `chosen` is "cpu", "cuda:N", or empty for the CPU; `wanted` is the spec's `workers.device`. Initialises nothing."""
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


def available_bytes(device: str) -> int:
    """The memory that can still be allocated where the model is: on the device, or on this node, its limit included."""
    if device != CPU:
        return int(torch.cuda.mem_get_info(device)[0])
    return min(memory_available_bytes(), memory_limit_bytes() or sys.maxsize)


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
