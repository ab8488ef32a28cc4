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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pscluster.errors import PsError
from pscluster.reachability import unreachable
from pscluster.wire.connection import Connection, ConnectionHandler
from pscluster.wire.newcomers import Newcomers
from pscluster.wire.transport import accept, bind, control_congestion, start_dial

if TYPE_CHECKING:
    from pscluster.wire.tls import DataSecurity, TlsStream

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ACCEPT_AGAIN_S = 0.1
DIAL_S = 5.0  # in which a connection must be made; the kernel would try for minutes, with long pauses

Dialed = Callable[[Connection | None, PsError | None], None]
"""Called once: with the connection, or with why there is none."""


@dataclass(eq=False)
class _Dial:
    """A connection on its way: first the socket's, then the handshake of TLS. `peer`: the process that must answer."""

    address: str
    peer: str
    handler: ConnectionHandler
    done: Dialed
    stream: socket.socket | TlsStream
    fd: int  # the stream's, as the selector knows it


class Reactor:
    """Runs on one thread; only `post` may be called from others.

    `phase(name)` is entered around moving bytes: "receive", which includes what the handlers do, and "send".
    `congestion_control`: of TCP connections, checked before; None is the host's default.
    `security`: of TCP connections, both ways; None: they are plain, and nobody's identity is known."""

    def __init__(
        self,
        phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
        congestion_control: str | None = None,
        security: DataSecurity | None = None,
    ) -> None:
        self._phase = phase
        self._security = security
        self._congestion_control = congestion_control
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._interest: dict[Connection, int] = {}
        self._listeners: list[tuple[socket.socket, str]] = []
        self._dialling: set[_Dial] = set()
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
        without a `context` after `handshake_s` is closed: its peer has not identified itself; so is the oldest of
        these when there are too many. Raises AddressInUseError."""
        listener, bound = bind(address)
        self._listeners.append((listener, bound))
        newcomers = Newcomers(handshake_s)
        self._listen_on(listener, handler, newcomers)
        if math.isfinite(handshake_s):
            self._close_late(newcomers)
        return bound

    def dial(self, address: str, handler: ConnectionHandler, done: Dialed, peer: str = "") -> None:
        """Connect to `address` within `DIAL_S`; over TLS only if the other end is the process `peer`.

        File descriptors are taken from the listening side only."""
        try:
            sock, connected = start_dial(address)
        except OSError as error:
            reason = unreachable(error, peer or "a peer", address)
            self.post(lambda: done(None, reason))
            return
        dial = _Dial(address, peer, handler, done, sock, sock.fileno())
        self._dialling.add(dial)
        if sock.family != socket.AF_UNIX:
            self.call_later(DIAL_S, lambda: self._end_dial(dial, TimeoutError()))
        if connected:
            self.post(lambda: self._connected(dial))
        else:
            self._selector.register(dial.fd, selectors.EVENT_WRITE, lambda: self._connected(dial))

    def adopt(
        self, stream: socket.socket | TlsStream, handler: ConnectionHandler, *, takes_fds: bool = False
    ) -> Connection:
        """Drive a connected socket from now on. The reactor owns it."""
        if self._congestion_control is not None:
            control_congestion(stream, self._congestion_control)
        if isinstance(stream, socket.socket):
            stream.setblocking(False)
            connection = Connection(stream, handler, self._update_interest, takes_fds=takes_fds)
        else:
            connection = Connection(stream, handler, self._update_interest, read_soon=self._read_soon)
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
        for dial in self._dialling:
            dial.stream.close()
        with self._closing:
            self._closed = True
            self._selector.close()
            os.close(self._wake)

    def _listen_on(self, listener: socket.socket, handler: ConnectionHandler, newcomers: Newcomers) -> None:
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener, handler, newcomers))

    def _accept(self, listener: socket.socket, handler: ConnectionHandler, newcomers: Newcomers) -> None:
        try:
            sock = accept(listener)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            # New connections wait in the kernel's queue; open ones are still served.
            self._selector.unregister(listener)
            self.call_later(_ACCEPT_AGAIN_S, lambda: self._listen_on(listener, handler, newcomers))
            return
        if sock is not None:
            security = self._security if sock.family != socket.AF_UNIX else None
            newcomers.add(self.adopt(sock if security is None else security.accepted(sock), handler))

    def _close_late(self, newcomers: Newcomers) -> None:
        newcomers.close_late()
        self.call_later(newcomers.next_s(), lambda: self._close_late(newcomers))

    def _connected(self, dial: _Dial) -> None:
        """The socket is connected, or cannot be."""
        if dial not in self._dialling:
            return
        sock = dial.stream
        assert isinstance(sock, socket.socket)
        self._stop_watching(dial)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._end_dial(dial, OSError(code, os.strerror(code)))
        elif self._security is None or sock.family == socket.AF_UNIX:
            self._dialled(dial)
        else:
            dial.stream = self._security.dialled(sock, dial.peer)
            self._selector.register(dial.fd, selectors.EVENT_READ, lambda: self._shake_hands(dial))
            self._shake_hands(dial)

    def _shake_hands(self, dial: _Dial) -> None:
        assert not isinstance(dial.stream, socket.socket)
        try:
            dial.stream.shake_hands()
        except BlockingIOError:
            return
        except (OSError, PsError) as error:
            self._end_dial(dial, error)
        else:
            self._stop_watching(dial)
            self._dialled(dial)

    def _dialled(self, dial: _Dial) -> None:
        self._dialling.discard(dial)
        dial.done(self.adopt(dial.stream, dial.handler, takes_fds=True), None)

    def _end_dial(self, dial: _Dial, error: OSError | PsError) -> None:
        """It cannot be made, or its time is up. Nothing happens once it has ended."""
        if dial in self._dialling:
            self._dialling.discard(dial)
            self._stop_watching(dial)
            dial.stream.close()
            known = error if isinstance(error, PsError) else unreachable(error, dial.peer or "a peer", dial.address)
            dial.done(None, known)

    def _stop_watching(self, dial: _Dial) -> None:
        if dial.fd in self._selector.get_map():
            self._selector.unregister(dial.fd)

    def _receive(self, connection: Connection) -> None:
        if connection.is_open:
            with self._phase("receive"):
                connection.readable()

    def _read_soon(self, connection: Connection) -> None:
        self.post(lambda: self._receive(connection))

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
