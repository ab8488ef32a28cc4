"""Two ends of real connections on one reactor, driven by the test, over every transport.

"shm" is a Unix connection whose ends agree to share memory when they greet, as a trainer and a partition do: the
dialling side's frames lie in lanes, the listening side's values in a segment that the other reads through a window."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.certificates import credentials, security
from pscluster.errors import FrameError, PsError
from pscluster.security.tls import client_context, server_context
from pscluster.wire.connection import Connection
from pscluster.wire.frame import IN_MEMORY, Buffer, FrameKind, Header, in_lane, lane_of
from pscluster.wire.memory import PAGE_BYTES, Arena, Lanes, Segment
from pscluster.wire.reactor import Reactor

TRANSPORTS = ("unix", "tcp", "shm", "tls")
PROCESS = "job-a/trainer-0/1"  # that both ends are, over TLS
DEADLINE_S = 20.0
MIB = 1 << 20
NUM_LANES = 3
_LENGTH_BYTES = 8  # of a body in shared memory, before it
_SIZES = [MIB + PAGE_BYTES]  # of the one bucket


def header(step: int = 0, *, kind: FrameKind = FrameKind.PUSH) -> Header:
    return Header(kind=kind, job=1, step=step)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _ignore(_connection: Connection, _header: Header) -> None:
    """Keeps received frames."""


class Shared:
    """One end's view of the memory that a connection's ends share."""

    def __init__(self, lanes: Lanes, segment: Segment) -> None:
        self.lanes = lanes
        self.segment = segment
        self.window = Arena(_SIZES[0])
        self.window.show(0, segment, 0, _SIZES[0])

    @classmethod
    def create(cls) -> Shared:
        return cls(Lanes.create(_SIZES, NUM_LANES), Segment.create(_SIZES[0], writable_by_others=False))

    @classmethod
    def open(cls, fds: list[int]) -> Shared:
        return cls(Lanes.open(fds[0], _SIZES, NUM_LANES), Segment.open(fds[1], _SIZES[0], writable=False))

    def put_in_lane(self, body: bytes) -> int | None:
        """The lane of the body; None: it does not fit, or no lane is free."""
        lane = self.lanes.take(0) if len(body) <= _SIZES[0] - _LENGTH_BYTES else None
        if lane is not None:
            _put(self.lanes.place(0, lane), body)
        return lane

    def body_of(self, header: Header) -> bytes:
        """The bytes at the position that a frame names; its lane, if any, is freed."""
        if header.kind is FrameKind.VALUES:
            return _get(self.window.view)
        body = _get(self.lanes.place(0, lane_of(header)))
        self.lanes.give_back(0, lane_of(header))
        return body

    def publish(self, body: bytes) -> None:
        _put(self.segment.view, body)


def _put(place: memoryview, body: bytes) -> None:
    place[:_LENGTH_BYTES] = len(body).to_bytes(_LENGTH_BYTES, "little")
    place[_LENGTH_BYTES : _LENGTH_BYTES + len(body)] = body


def _get(place: memoryview) -> bytes:
    length = int.from_bytes(place[:_LENGTH_BYTES], "little")
    return bytes(place[_LENGTH_BYTES : _LENGTH_BYTES + length])


@dataclass
class Recorder:
    """A handler that keeps what it gets, greetings apart. `limit_bytes`: longer bodies are refused before memory is
    given. `takes`: the descriptors that come with a frame are taken, into `fds`."""

    limit_bytes: int = 64 * MIB
    frames: list[tuple[Header, bytes]] = field(default_factory=list)
    ends: list[PsError | None] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    shared: dict[Connection, Shared] = field(default_factory=dict)
    given_bytes: int = 0
    takes: bool = False
    fds: list[int] = field(default_factory=list)
    on_frame: Callable[[Connection, Header], None] = _ignore

    def body_target(self, connection: Connection, header: Header) -> memoryview:  # noqa: ARG002 - Handler's
        if header.length > self.limit_bytes:
            raise FrameError(f"{header.length} bytes", details={"field": "length"})
        if header.kind is FrameKind.FENCED:
            return memoryview(bytearray(1))  # not the length in the header
        self.given_bytes += header.length
        return memoryview(bytearray(header.length))

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        if header.kind is FrameKind.HELLO:
            shared = self.shared[connection] = Shared.create()
            connection.send(replace(header, kind=FrameKind.WELCOME), fds=[shared.lanes.fd, shared.segment.fd])
            return
        if header.kind is FrameKind.WELCOME:
            self.shared[connection] = Shared.open(connection.take_fds())
            return
        if connection not in self.connections:
            self.connections.append(connection)
        if self.takes:
            self.fds += connection.take_fds()
        data = self.shared[connection].body_of(header) if header.flags & IN_MEMORY else bytes(body)
        self.frames.append((header, data))
        self.on_frame(connection, header)

    def closed(self, connection: Connection, error: PsError | None) -> None:
        self.shared.pop(connection, None)
        self.ends.append(error)

    @property
    def steps(self) -> list[int]:
        return [header.step for header, _ in self.frames]


@dataclass
class World:
    """A listening and a dialling side on one reactor."""

    reactor: Reactor
    transport: str
    address: str
    listening: Recorder
    dialling: Recorder

    @classmethod
    def create(cls, transport: str, directory: Path, **fields: Any) -> World:
        listening = Recorder()
        reactor = Reactor(security=security(PROCESS) if transport == "tls" else None)
        address = "tcp:127.0.0.1:0" if transport in ("tcp", "tls") else f"unix:{directory}/s"
        return cls(reactor, transport, reactor.listen(address, listening, **fields), listening, Recorder())

    def until(self, condition: Callable[[], bool]) -> None:
        """Handle events until the condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "nothing more happens"
            self.reactor.poll(0.05)

    def dial(self, address: str | None = None) -> Connection:
        """A connection, with shared memory if the transport has it."""
        answers: list[tuple[Connection | None, PsError | None]] = []
        self.reactor.dial(address or self.address, self.dialling, lambda *answer: answers.append(answer), PROCESS)
        self.until(lambda: bool(answers))
        connection, why = answers[0]
        assert connection is not None, why
        if self.transport == "shm" and address is None:
            connection.send(header(kind=FrameKind.HELLO))
            self.until(lambda: connection in self.dialling.shared)
        return connection

    def accepted(self, connection: Connection) -> Connection:
        """The other end, found by a first frame."""
        known = len(self.listening.connections)
        connection.send(header(99))
        self.until(lambda: len(self.listening.connections) > known)
        self.listening.frames.clear()
        return self.listening.connections[-1]

    def give(self, connection: Connection, head: Header, parts: Sequence[Buffer] = (), **fields: Any) -> bool:
        """Send a frame from the dialling side as the transport does; whether its body is in shared memory."""
        shared = self.dialling.shared.get(connection)
        body = b"".join(bytes(part) for part in parts)
        lane = shared.put_in_lane(body) if shared is not None and body else None
        if lane is None:
            connection.send(head, parts, **fields)
        else:
            connection.send(replace(head, flags=in_lane(lane)), **fields)
        return lane is not None

    def show(self, connection: Connection, step: int, body: bytes) -> None:
        """Send values from the listening side as the transport does."""
        shared = self.listening.shared.get(connection)
        head = header(step, kind=FrameKind.VALUES)
        if shared is None:
            connection.send(head, [body])
        else:
            shared.publish(body)
            connection.send(replace(head, flags=IN_MEMORY))

    def raw(self) -> socket.socket:
        """A blocking socket to the listener, for peers that break the protocol; over TLS after its handshake."""
        sock = self.connect()
        if self.transport != "tls":
            return sock
        tls = client_context(credentials(PROCESS)).wrap_socket(sock, do_handshake_on_connect=False)
        tls.setblocking(False)
        self.until(lambda: _is_done(tls.do_handshake))
        tls.settimeout(DEADLINE_S)
        return tls

    def connect(self) -> socket.socket:
        """A blocking socket to the listener, on which nothing was sent."""
        kind, _, rest = self.address.partition(":")
        sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
        sock.settimeout(DEADLINE_S)
        sock.connect(rest if kind == "unix" else ("127.0.0.1", int(rest.rpartition(":")[2])))
        return sock

    def feed(self, peer: socket.socket, data: bytes) -> None:
        """Send from a raw peer more than its socket buffers."""
        deadline, left = time.monotonic() + DEADLINE_S, memoryview(data)
        peer.setblocking(False)
        while left:
            assert time.monotonic() < deadline, "nobody reads"
            try:
                left = left[peer.send(left) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                self.reactor.poll(0.05)
        peer.settimeout(DEADLINE_S)

    def raw_listener(self) -> tuple[Connection, socket.socket]:
        """A connection that the reactor dialled, and the blocking socket at its other end."""
        if self.address.startswith("unix:"):
            path = self.address.removeprefix("unix:") + "-raw"
            listener, address = socket.socket(socket.AF_UNIX), f"unix:{path}"
            listener.bind(path)
            listener.listen()
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            address = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        with listener, ThreadPoolExecutor(1) as thread:
            answer = thread.submit(self._answer, listener)
            connection = self.dial(address)
            peer = answer.result(DEADLINE_S)
        if self.address.startswith("unix:"):
            os.unlink(path)
        peer.settimeout(DEADLINE_S)
        return connection, peer

    def _answer(self, listener: socket.socket) -> socket.socket:
        peer, _ = listener.accept()
        if self.transport != "tls":
            return peer
        peer.settimeout(DEADLINE_S)
        return server_context(credentials(PROCESS)).wrap_socket(peer, server_side=True)


def _is_done(call: Callable[[], object]) -> bool:
    try:
        call()
    except ssl.SSLWantReadError:
        return False
    return True
