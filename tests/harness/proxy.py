"""A proxy whose connections the test cuts, to see what a broken network does."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from pathlib import Path


class CuttingProxy:
    """Forwards connections to one address, "tcp:host:port" or "unix:/path"; `cut` breaks all of them at once, new ones
    are accepted again. File descriptors that come over a Unix socket are passed on."""

    def __init__(self, target: str) -> None:
        self._target = target
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

    def close(self) -> None:
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
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

    def _connect(self) -> socket.socket:
        kind, _, rest = self._target.partition(":")
        if kind == "unix":
            far = socket.socket(socket.AF_UNIX)
            far.connect(rest)
            return far
        host, _, port = rest.rpartition(":")
        return socket.create_connection((host, int(port)))


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            fds: list[int] = []
            if source.family == socket.AF_UNIX:
                data, fds, _, _ = socket.recv_fds(source, 1 << 16, 4)
            else:
                data = source.recv(1 << 16)
            if not data:
                break
            if fds:
                sent = socket.send_fds(sink, [data], fds)
                data = data[sent:]
                for fd in fds:
                    os.close(fd)
            sink.sendall(data)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
