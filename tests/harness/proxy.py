"""A proxy whose connections a test cuts, stalls or corrupts, to simulate a broken network."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Direction = Literal["there", "back"]
"""From the client to the target, or from the target back."""
Alter = Callable[[bytes], bytes]
"""Maps one piece of a stream to what is forwarded."""


class CuttingProxy:
    """Forwards connections to one address, "tcp:host:port" or "unix:/path"; `cut` breaks all of them at once, new ones
    are accepted again; `stall` lets nothing pass in one direction until `heal`, then all that was sent meanwhile. File
    descriptors that come over a Unix socket are passed on. `alter` sees every piece that passes."""

    def __init__(self, target: str, alter: Alter = bytes) -> None:
        self._target = target
        self._alter = alter
        self._passes: dict[Direction, threading.Event] = {"there": threading.Event(), "back": threading.Event()}
        for passes in self._passes.values():
            passes.set()
        if target.startswith("unix:"):
            self._directory = tempfile.TemporaryDirectory(prefix="psp-")
            path = Path(self._directory.name) / "data.sock"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            self.address = f"unix:{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Reset every connection; returns how many there were."""
        with self._lock:
            victims, self._open = self._open, []
        for sock in victims:
            with contextlib.suppress(OSError):
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        return len(victims) // 2

    def slow_down(self, bytes_per_s: float, delay_s: float) -> None:
        """Delay each further piece by this latency, and by the time that its bytes take at this rate."""

        def slowly(data: bytes) -> bytes:
            time.sleep(delay_s + len(data) / bytes_per_s)
            return data

        self._alter = slowly

    def _passing(self, data: bytes) -> bytes:
        return self._alter(data)

    def stall(self, direction: Direction) -> None:
        """Forward nothing more in this direction; connections stay open."""
        self._passes[direction].clear()

    def heal(self) -> None:
        """Forward everything again, including what was withheld."""
        for passes in self._passes.values():
            passes.set()

    def close(self) -> None:
        self.heal()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        if self._target.startswith("unix:"):
            self._directory.cleanup()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.accepted += 1
                far = self._connect()
                with self._lock:
                    self._open += [near, far]
                ways: tuple[tuple[Direction, socket.socket, socket.socket], ...]
                ways = (("there", near, far), ("back", far, near))
                for direction, source, sink in ways:
                    passes = self._passes[direction]
                    threading.Thread(target=_pump, args=(source, sink, passes, self._passing), daemon=True).start()

    def _connect(self) -> socket.socket:
        kind, _, rest = self._target.partition(":")
        if kind == "unix":
            far = socket.socket(socket.AF_UNIX)
            far.connect(rest)
            return far
        host, _, port = rest.rpartition(":")
        return socket.create_connection((host, int(port)))


class BitFlips:
    """An `Alter` that flips one bit in every so many pieces, on average. Thread-safe."""

    def __init__(self, seed: int, one_in: int) -> None:
        self._draw = random.Random(seed)
        self._one_in = one_in
        self._lock = threading.Lock()
        self.flipped = 0

    def __call__(self, data: bytes) -> bytes:
        with self._lock:
            if self._draw.randrange(self._one_in):
                return data
            self.flipped += 1
            bit = self._draw.randrange(len(data) * 8)
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        return bytes(altered)


def _pump(source: socket.socket, sink: socket.socket, passes: threading.Event, alter: Alter) -> None:
    with contextlib.suppress(OSError):
        while True:
            passes.wait()
            fds: list[int] = []
            if source.family == socket.AF_UNIX:
                data, fds, _, _ = socket.recv_fds(source, 1 << 16, 4)
            else:
                data = source.recv(1 << 16)
            if not data:
                break
            passes.wait()
            data = alter(data)
            if fds:
                sent = socket.send_fds(sink, [data], fds)
                data = data[sent:]
                for fd in fds:
                    os.close(fd)
            sink.sendall(data)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
