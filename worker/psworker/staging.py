"""Between a model's device and host memory: gradients on their way out, values on their way in.

On the CPU both are the same memory or one copy away. A CUDA device copies on streams of its own, behind backward and
before forward, from and to pinned memory; a thread waits for what was copied out and sends it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from typing import Any, Protocol

import torch

from pscluster.errors import InternalError

_READ_WRITE = 0  # cudaHostRegisterDefault, driver_types.h
_SUCCESS = 0


class Staging(Protocol):
    """Used by the thread that runs forward and backward, unless said otherwise."""

    is_host: bool
    """Gradients lie in host memory already, and may be sent from where they are."""

    def pin(self, memory: torch.Tensor) -> None:
        """Make copies to and from this host memory fast, while it is mapped. From any thread; may do nothing."""

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy a gradient to host memory. `target` is complete when what follows in `after` is called."""

    def after(self, call: Callable[[], None], kept: object) -> None:
        """Have `call` run when all that was copied out is there, in order, soon; until then `kept` is kept alive."""

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy values from host memory to where the model is; what is computed from now on sees them."""

    def close(self) -> None:
        """End what is begun; blocks briefly."""


class HostStaging:
    """The model is in host memory."""

    is_host = True

    def pin(self, memory: torch.Tensor) -> None:
        """Nothing to do: all host memory is alike."""

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def after(self, call: Callable[[], None], kept: object) -> None:  # noqa: ARG002 - done before it returns
        call()

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """The model reads `source` itself: both are the same memory."""

    def close(self) -> None:
        """Nothing is under way."""


class CudaStaging:
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
    return HostStaging() if device == "cpu" else CudaStaging(torch.device(device))
