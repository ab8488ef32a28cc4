"""The loop that drives a process's data-plane sockets: one thread, no locks, timers, calls from other threads."""

from __future__ import annotations

import errno
import heapq
import itertools
import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pscluster.errors import FrameError
from pscluster.wire.connection import Connection, ConnectionHandler
from pscluster.wire.transport import accept, bind, control_congestion, start_dial

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ACCEPT_AGAIN_S = 0.1
DIAL_S = 5.0  # in which a connection must be made; the kernel would try for minutes, with long pauses


class Reactor:
    """Runs on one thread; only `post` may be called from others.

    `phase(name)` is entered around moving bytes: "receive", which includes what the handlers do, and "send".
    `congestion_control`: of TCP connections, checked before; None is the host's default."""

    def __init__(
        self,
        phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
        congestion_control: str | None = None,
    ) -> None:
        self._phase = phase
        self._congestion_control = congestion_control
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._interest: dict[Connection, int] = {}
        self._listeners: list[tuple[socket.socket, str]] = []
        self._dialling: set[socket.socket] = set()
        self._stopped = False
        self._closed = False
        self._closing = threading.Lock()  # keeps `post` from writing to a descriptor that was closed and reused
        self._selector.register(self._wake, selectors.EVENT_READ, self._drain_posted)

    def run(self) -> None:
        """Serve until `stop`. Blocks."""
        while not self._stopped:
            self.poll(None)

    def stop(self) -> None:
        self._stopped = True

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run on the reactor's thread, in order, soon; after `close` it is dropped. From any thread; never
        blocks."""
        with self._closing:
            if not self._closed:
                self._posted.append(call)
                os.eventfd_write(self._wake, 1)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have `call` run once, at least `delay_s` from now."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), call))

    def poll(self, timeout_s: float | None) -> None:
        """Serve what is ready; wait up to `timeout_s` (None: for ever) when nothing is. A handler may call it with 0
        between two long pieces of work."""
        if self._timers:
            until_timer = max(0.0, self._timers[0][0] - time.monotonic())
            timeout_s = until_timer if timeout_s is None else min(timeout_s, until_timer)
        for key, events in self._selector.select(timeout_s):
            if isinstance(key.data, Connection):
                if events & selectors.EVENT_WRITE and key.data.is_open:
                    with self._phase("send"):
                        key.data.flush()
                if events & selectors.EVENT_READ and key.data.is_open:
                    with self._phase("receive"):
                        key.data.readable()
            else:
                key.data()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Have `call` run whenever `fd` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, call)

    def listen(self, address: str, handler: ConnectionHandler, handshake_s: float = math.inf) -> str:
        """Accept connections at `address` for `handler`; returns the address that peers dial (port resolved). One
        without a `context` after `handshake_s` is closed: its peer has not identified itself. Raises
        AddressInUseError."""
        listener, bound = bind(address)
        self._listeners.append((listener, bound))
        self._listen_on(listener, handler, handshake_s)
        return bound

    def dial(self, address: str, handler: ConnectionHandler, done: Callable[[Connection | None, str], None]) -> None:
        """Connect to `address` within `DIAL_S`; `done` is called once with the connection, or with None and the reason.

        File descriptors are taken from the listening side only."""
        try:
            sock, connected = start_dial(address)
        except OSError as error:
            self.post(lambda reason=str(error): done(None, reason))  # type: ignore[misc]
            return
        if connected:
            self.post(lambda: done(self.adopt(sock, handler, takes_fds=True), ""))
            return
        self._dialling.add(sock)
        self._selector.register(sock, selectors.EVENT_WRITE, lambda: self._dialled(sock, handler, done))
        self.call_later(DIAL_S, lambda: self._end_dial(sock, done))

    def adopt(self, sock: socket.socket, handler: ConnectionHandler, *, takes_fds: bool = False) -> Connection:
        """Drive a connected socket from now on. The reactor owns it."""
        sock.setblocking(False)
        if self._congestion_control is not None:
            control_congestion(sock, self._congestion_control)
        connection = Connection(sock, handler, self._update_interest, takes_fds=takes_fds)
        self._update_interest(connection)
        return connection

    def close(self) -> None:
        """Close every connection and listener, and remove the listeners' socket files. After `run` has returned."""
        for connection in list(self._interest):
            connection.close()
        for listener, bound in self._listeners:
            listener.close()
            if bound.startswith("unix:"):
                Path(bound.removeprefix("unix:")).unlink(missing_ok=True)
        for sock in self._dialling:
            sock.close()
        with self._closing:
            self._closed = True
            self._selector.close()
            os.close(self._wake)

    def _listen_on(self, listener: socket.socket, handler: ConnectionHandler, handshake_s: float) -> None:
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener, handler, handshake_s))

    def _accept(self, listener: socket.socket, handler: ConnectionHandler, handshake_s: float) -> None:
        try:
            sock = accept(listener)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            # New connections wait in the kernel's queue; open ones are still served.
            self._selector.unregister(listener)
            self.call_later(_ACCEPT_AGAIN_S, lambda: self._listen_on(listener, handler, handshake_s))
            return
        if sock is not None:
            connection = self.adopt(sock, handler)
            if math.isfinite(handshake_s):
                self.call_later(handshake_s, lambda: self._close_unless_accepted(connection))

    def _close_unless_accepted(self, connection: Connection) -> None:
        if connection.context is None:
            connection.close(FrameError("a connection without a HELLO", details={"field": "handshake"}))

    def _dialled(self, sock: socket.socket, handler: ConnectionHandler, done: Callable[..., Any]) -> None:
        self._selector.unregister(sock)
        self._dialling.discard(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            sock.close()
            done(None, os.strerror(error))
        else:
            done(self.adopt(sock, handler, takes_fds=True), "")

    def _end_dial(self, sock: socket.socket, done: Callable[..., Any]) -> None:
        """The time limit of a dial that is still pending."""
        if sock in self._dialling:
            self._selector.unregister(sock)
            self._dialling.discard(sock)
            sock.close()
            done(None, f"no answer within {DIAL_S:g} s")

    def _drain_posted(self) -> None:
        os.eventfd_read(self._wake)
        for _ in range(len(self._posted)):
            self._posted.popleft()()

    def _update_interest(self, connection: Connection) -> None:
        wanted = 0
        if connection.is_open:
            wanted |= selectors.EVENT_READ if connection.reading else 0
            wanted |= selectors.EVENT_WRITE if connection.wants_write else 0
        present = self._interest.get(connection, 0)
        if wanted == present and connection in self._interest:
            return
        if present and wanted:
            self._selector.modify(connection.socket, wanted, connection)
        elif wanted:
            self._selector.register(connection.socket, wanted, connection)
        elif present:
            self._selector.unregister(connection.socket)
        if connection.is_open:
            self._interest[connection] = wanted
        else:
            self._interest.pop(connection, None)
