"""A trainer's two connections to one partition: pushes on one, values on the other. On the reactor's thread."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Protocol

from pscluster.errors import FrameError, PsError
from pscluster.wire.connection import Connection
from pscluster.wire.dialer import ReconnectingConnection
from pscluster.wire.frame import IN_MEMORY, FrameKind, Header, in_lane
from pscluster.wire.memory import Lanes
from pscluster.wire.protocol import Ack, Channel, Hello, Welcome
from pscluster.wire.reactor import Reactor
from pscluster.wire.transport import transport_of
from psworker.trainer.gradients.send_queue import SendQueue
from psworker.trainer.values.values import Values

_RETRY_S = (0.02, 1.0)


class Receiver(Protocol):
    """Where a peer's frames go: the exchange."""

    values: Values

    def make_hello(self, channel: Channel, *, share: bool) -> tuple[Header, Hello]:
        """The HELLO to open a connection with; `share`: memory can be shared over it."""

    def map_lanes(self, index: int, fd: int, num_lanes: int) -> Lanes:
        """The partition shares lanes for gradients; takes over `fd`."""

    def unmap_lanes(self, index: int) -> None:
        """The connection over which lanes were shared is gone."""

    def welcomed(self, index: int, welcome: Welcome) -> None:
        """Values can be pulled."""

    def receive(self, index: int, header: Header, body: memoryview) -> None:
        """A DIRECTIVE or MERGED."""


class Peer:
    """Connects to partition `index` at its plan's address until it is closed; keeps pending frames over reconnects."""

    def __init__(self, reactor: Reactor, receiver: Receiver, index: int, addresses: list[str], transport: str) -> None:
        self.index = index
        self.addresses = list(addresses)
        self.outbox = SendQueue()
        self.receiver = receiver
        self.reconnects = 0
        self._reactor = reactor
        self._pushing = False
        self._scratch = bytearray()
        wants_memory = transport in ("auto", "shm")

        def hello(channel: Channel, connection: Connection) -> tuple[Header, Hello]:
            return receiver.make_hello(channel, share=connection.is_local and wants_memory)

        self._pushes, self._pulls = _Pushes(self), _Pulls(self)
        self._push_line = ReconnectingConnection(
            reactor, self._pushes, lambda connection: hello("push", connection), channel="push",
            kinds=frozenset({FrameKind.ACK}), transport=transport, retry_s=_RETRY_S,
        )  # fmt: skip
        self._pull_line = ReconnectingConnection(
            reactor, self._pulls, lambda connection: hello("pull", connection), channel="pull",
            kinds=frozenset({FrameKind.VALUES, FrameKind.DIRECTIVE, FrameKind.MERGED}),
            transport=transport, retry_s=_RETRY_S, body_target=self._values_target,
        )  # fmt: skip
        for line in self._lines:
            line.follow(self.addresses)

    @property
    def _lines(self) -> tuple[ReconnectingConnection, ReconnectingConnection]:
        return self._push_line, self._pull_line

    @property
    def is_connected(self) -> bool:
        return all(line.connection is not None for line in self._lines)

    @property
    def transport(self) -> str:
        """As `network.transport` spells it; "shm" when the partition shares memory."""
        return "shm" if self._pushes.shares or self._pulls.shares else transport_of(self._pull_line.dialed)

    def unreached_s(self, now_s: float) -> float:
        """For how long nothing at the partition's addresses has taken a connection, by the monotonic clock; 0: there is
        one of each kind. From any thread."""
        return max(line.unreached_s(now_s) for line in self._lines)

    def close(self) -> None:
        """Drop the connections and stop dialling."""
        for line in self._lines:
            line.close()

    def pull(self, header: Header) -> None:
        """Ask for values, if connected; `Receiver.welcomed` asks again after a reconnect."""
        connection = self._pull_line.connection
        if connection is not None:
            connection.send(header)

    def push(self) -> None:
        """Send what is pending as far as the credit goes."""
        connection = self._push_line.connection
        if connection is None or self._pushing:
            return
        self._pushing = True
        while connection.is_open and not connection.wants_write:
            owed = self.outbox.next()
            if owed is None:
                break
            if owed.lane is not None and self.outbox.is_shared(owed):
                connection.send(replace(owed.header, flags=in_lane(owed.lane.number)))
            else:
                connection.send(owed.header, owed.parts, on_sent=self._push_soon)
        self._pushing = False

    def _push_soon(self) -> None:
        self._reactor.post(self.push)

    def _values_target(self, header: Header) -> memoryview | None:
        """Values land in the model's memory; other bodies are small."""
        if header.kind is not FrameKind.VALUES or header.flags & IN_MEMORY:
            return None
        target = self.receiver.values.target(self.index, header)
        return self._discard(header.length) if target is None else target

    def _discard(self, length: int) -> memoryview:
        if len(self._scratch) < length:
            self._scratch = bytearray(length)
        return memoryview(self._scratch)[:length]

    def take_fd(self, line: ReconnectingConnection) -> int | None:
        """The descriptor of the memory that came with a WELCOME; the caller's to close."""
        assert line.connection is not None
        fds = line.connection.take_fds()
        for surplus in fds[1:]:
            os.close(surplus)
        return fds[0] if fds else None


class _Pushes:
    """Receives on the push connection: its WELCOME and ACKs."""

    def __init__(self, peer: Peer) -> None:
        self.shares = False
        self._peer = peer
        self._is_welcome = False

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - Receiver's signature
        peer, welcome = self._peer, Welcome.unpack(body)
        fd = peer.take_fd(peer._push_line)
        self._is_welcome, self.shares = True, fd is not None
        lanes = peer.receiver.map_lanes(peer.index, fd, welcome.num_lanes) if fd is not None else None
        peer.outbox.reconnected(welcome.granted_bytes, welcome.open_bucket, lanes)
        peer.push()

    def frame(self, header: Header, body: memoryview) -> None:
        queue, ack = self._peer.outbox, Ack.unpack(body)
        queue.granted_bytes = ack.granted_bytes
        if ack.kind in (None, FrameKind.PUSH):  # others do not know
            queue.open_bucket = ack.open_bucket
        if ack.kind is not None:
            queue.acknowledged((ack.kind, header.step, header.bucket, header.node.first, header.node.leaves))
        self._peer.push()

    def lost(self, error: PsError | None) -> None:  # noqa: ARG002 - it is dialed again whatever it was
        if self._is_welcome:
            self._is_welcome = self.shares = False
            self._peer.reconnects += 1
            self._peer.receiver.unmap_lanes(self._peer.index)


class _Pulls:
    """Receives on the pull connection: its WELCOME, values, and what the coordinator says."""

    def __init__(self, peer: Peer) -> None:
        self.shares = False
        self._peer = peer
        self._is_welcome = False

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - Receiver's signature
        peer, welcome = self._peer, Welcome.unpack(body)
        fd = peer.take_fd(peer._pull_line)
        self._is_welcome, self.shares = True, fd is not None
        if fd is not None:
            peer.receiver.values.map(peer.index, fd)
        peer.receiver.welcomed(peer.index, welcome)

    def frame(self, header: Header, body: memoryview) -> None:
        peer = self._peer
        if header.kind is not FrameKind.VALUES:
            peer.receiver.receive(peer.index, header, body)
            return
        in_memory = bool(header.flags & IN_MEMORY)
        if in_memory == bool(header.length):
            where = "in memory" if in_memory else f"of {header.length} bytes"
            raise FrameError(f"values {where} on a pull connection", details={"field": "flags"})
        if in_memory:
            peer.receiver.values.shown(peer.index, header)
        else:
            peer.receiver.values.landed(peer.index, header)

    def lost(self, error: PsError | None) -> None:  # noqa: ARG002 - it is dialed again whatever it was
        if self._is_welcome:
            self._is_welcome = self.shares = False
            self._peer.reconnects += 1
