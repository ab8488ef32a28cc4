"""A job whose trainers lose the data plane when a test orders it; their connections to agents are not affected.

While the file NAME.cut is there, which lists addresses, the trainers of worker NAME have no connection to them, and can
make none. Once it is so they leave the file NAME.struck. `cut_spec` writes this very file into the directory that is
submitted. The bits are those of SyntheticLm.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import pscluster.wire.reactor
from pscluster.wire.connection import Connection
from pscluster.wire.transport import start_dial
from psworker.tasks.synthetic import SyntheticLm


class Cut(SyntheticLm):
    """Reads orders from the first microbatch on."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self._watching = False

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        if not self._watching:
            self._watching = True
            pscluster.wire.reactor.start_dial = self._dial  # type: ignore[assignment]
            threading.Thread(target=self._watch, daemon=True).start()
        return super().loss(model, batch)

    @property
    def _order(self) -> Path:
        worker = next(part for part in Path(__file__).parts if part.startswith("worker-"))  # whose copy this is
        return Path(self.data_uri) / f"{worker}.cut"

    def _cut_addresses(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return self._order.read_text().split()
        return []

    def _dial(self, address: str) -> tuple[socket.socket, bool]:
        if address in self._cut_addresses():
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        return start_dial(address)

    def _watch(self) -> None:
        """Once there is an order, break every connection to those addresses."""
        while True:
            cut = self._cut_addresses()
            struck = 0
            for held in gc.get_objects() if cut else ():
                if isinstance(held, Connection) and held.is_open and _address(held.socket) in cut:
                    held.socket.shutdown(socket.SHUT_RDWR)
                    struck += 1
            if struck:
                self._order.with_suffix(".struck").touch()
            time.sleep(0.1)


def _address(sock: socket.socket) -> str:
    with contextlib.suppress(OSError):
        peer = sock.getpeername()
        return f"unix:{peer}" if sock.family == socket.AF_UNIX else f"tcp:{peer[0]}:{peer[1]}"
    return ""


def cut_spec(spec: dict[str, Any], directory: Path) -> tuple[dict[str, Any], Path]:
    """The spec of a SyntheticLm job whose trainers can be cut off, to be submitted from `directory`; and where orders
    are looked for."""
    (directory / "cut_task.py").write_text(Path(__file__).read_text())
    orders = directory / "orders"
    orders.mkdir()
    task = {"entrypoint": "cut_task:Cut", "args": spec["task"]["args"]}
    return {**spec, "task": task, "data": {"uri": str(orders)}}, orders
