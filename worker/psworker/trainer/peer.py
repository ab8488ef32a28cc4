"""A trainer's two connections to one partition: pushes on one, values on the other. On the reactor's thread."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from dataclasses import replace
from typing import Protocol

from pscluster.errors import FrameError, PsError
from pscluster.step.tree import TreeNode
from pscluster.wire.connection import Connection
from pscluster.wire.frame import IN_MEMORY, MAX_SMALL_BYTES, FrameKind, Header, in_lane
from pscluster.wire.memory import Lanes
from pscluster.wire.reactor import Reactor
from pscluster.wire.transport import choose_address, transport_of
from psworker.trainer.gradients.send_queue import SendQueue
from psworker.trainer.values.values import Values

ACK_BODY = struct.Struct("<BQI")  # kind acknowledged (0: credit alone), granted bytes, open bucket
NO_BUCKET = 0xFFFF_FFFF
_RETRY_S = (0.02, 1.0)


class Receiver(Protocol):
    """Where a peer's frames go: the exchange."""

    values: Values

    def greeting(self, channel: str) -> tuple[Header, dict[str, object]]:
        """The HELLO to open a connection with."""

    def map_lanes(self, index: int, fd: int, num_lanes: int) -> Lanes:
        """The partition shares lanes for gradients; takes over `fd`."""

    def unmap_lanes(self, index: int) -> None:
        """The connection over which lanes were shared is gone."""

    def heard(self, index: int, header: Header, body: memoryview) -> None:
        """A WELCOME of the pull connection, a DIRECTIVE, MERGED or FENCED."""


class Peer:
    """Dials partition `index` at its plan's address until it is closed; keeps what is owed over reconnects."""

    def __init__(self, reactor: Reactor, receiver: Receiver, index: int, addresses: list[str], transport: str) -> None:
        self.index = index
        self.addresses = list(addresses)
        self.outbox = SendQueue()
        self.reconnects = 0
        self._reactor = reactor
        self._receiver = receiver
        self._wanted_transport = transport
        self.transport = ""
        self._connections: dict[str, Connection] = {}  # those that were welcomed, by channel
        self._failures = {"push": 0, "pull": 0}
        self._unreached_since_s: dict[str, float] = {}  # by channel that has no connection; monotonic
        self._closed = False
        self._scratch = bytearray()
        self._pushing = False
        for channel in ("push", "pull"):
            self._unreached_since_s[channel] = time.monotonic()
            self._dial(channel)

    @property
    def is_connected(self) -> bool:
        return len(self._connections) == 2

    def unreached_s(self, now_s: float) -> float:
        """For how long nothing at the partition's addresses has taken a connection, by the monotonic clock; 0: there is
        one of each kind. From any thread."""
        return max((now_s - since_s for since_s in list(self._unreached_since_s.values())), default=0.0)

    def close(self) -> None:
        """Drop the connections and stop dialling."""
        self._closed = True
        for connection in list(self._connections.values()):
            connection.close()

    def pull(self, header: Header) -> None:
        """Ask for values, if connected; `Receiver.heard` of the WELCOME asks again after a reconnect."""
        connection = self._connections.get("pull")
        if connection is not None:
            connection.send(header)

    def push(self) -> None:
        """Send what is owed as far as the credit goes."""
        connection = self._connections.get("push")
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

    def _dial(self, channel: str) -> None:
        if self._closed:
            return
        try:
            address = choose_address(self.addresses, self._wanted_transport)
        except FrameError:
            self._retry(channel)
            return
        self.transport = transport_of(address)
        self._reactor.dial(address, self, lambda connection, _: self._dialled(channel, connection))

    def _dialled(self, channel: str, connection: Connection | None) -> None:
        if connection is None:
            self._retry(channel)
        elif self._closed:
            connection.close()
        else:
            connection.context = channel
            self._unreached_since_s.pop(channel, None)
            header, told = self._receiver.greeting(channel)
            told["share"] = connection.is_local and self._wanted_transport in ("auto", "shm")
            connection.send(header, [json.dumps(told).encode()])

    def _retry(self, channel: str) -> None:
        self._failures[channel] += 1
        low, high = _RETRY_S
        delay = min(high, low * 1.5 ** min(self._failures[channel], 20)) * random.uniform(0.5, 1.5)
        self._reactor.call_later(delay, lambda: self._dial(channel))

    def body_target(self, connection: Connection, header: Header) -> memoryview:
        """Connection's `Handler`: values land in the model's memory, the rest is small."""
        if header.kind is FrameKind.VALUES and connection.context == "pull" and not header.flags & IN_MEMORY:
            target = self._receiver.values.target(self.index, header)
            return self._discard(header.length) if target is None else target
        if header.kind in (FrameKind.VALUES, FrameKind.PUSH) or header.length > MAX_SMALL_BYTES:
            raise FrameError(f"{header.kind.name} of {header.length} bytes from a partition")
        return memoryview(bytearray(header.length))

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        if header.kind is FrameKind.ACK:
            self._acknowledged(header, body)
        elif header.kind is FrameKind.VALUES:
            self._values(connection, header)
        elif header.kind is FrameKind.WELCOME:
            self._welcomed(connection, header, body)
        else:
            self._receiver.heard(self.index, header, body)

    def _values(self, connection: Connection, header: Header) -> None:
        in_memory = bool(header.flags & IN_MEMORY)
        if connection.context != "pull" or in_memory == bool(header.length):
            where = "in memory" if in_memory else f"of {header.length} bytes"
            raise FrameError(f"values {where} on a {connection.context} connection", details={"field": "flags"})
        if in_memory:
            self._receiver.values.shown(self.index, header)
        else:
            self._receiver.values.landed(self.index, header)

    def closed(self, connection: Connection, error: PsError | None) -> None:  # noqa: ARG002 - redialled whatever it was
        channel = str(connection.context)
        self._unreached_since_s[channel] = time.monotonic()
        if self._connections.get(channel) is connection:
            del self._connections[channel]
            if channel == "push":
                self._receiver.unmap_lanes(self.index)
            self.reconnects += 1
            self._failures[channel] = 0
        if not self._closed:
            self._retry(channel)

    def _welcomed(self, connection: Connection, header: Header, body: memoryview) -> None:
        channel = str(connection.context)
        if self._closed:  # meanwhile
            connection.close()
            return
        self._connections[channel] = connection
        self._failures[channel] = 0
        told, fds = json.loads(bytes(body)), connection.take_fds()
        for surplus in fds[1:]:
            os.close(surplus)
        if fds:
            self.transport = "shm"
        if channel == "push":
            lanes = self._receiver.map_lanes(self.index, fds[0], int(told["num_lanes"])) if fds else None
            self.outbox.reconnected(int(told["granted_bytes"]), int(told["open_bucket"]), lanes)
            self.push()
        else:
            if fds:
                self._receiver.values.map(self.index, fds[0])
            self._receiver.heard(self.index, header, body)

    def _acknowledged(self, header: Header, body: memoryview) -> None:
        if len(body) != ACK_BODY.size:
            raise FrameError(f"an ACK of {len(body)} bytes", details={"field": "length"})
        kind, self.outbox.granted_bytes, told = ACK_BODY.unpack(body)
        if kind in (0, FrameKind.PUSH):  # others do not know
            self.outbox.open_bucket = -1 if told == NO_BUCKET else told
        if header.node != TreeNode(0, 0) or header.bucket or kind:
            self.outbox.acknowledged(
                (FrameKind(kind), header.step, header.bucket, header.node.first, header.node.leaves)
            )
        self.push()

    def _discard(self, length: int) -> memoryview:
        if len(self._scratch) < length:
            self._scratch = bytearray(length)
        return memoryview(self._scratch)[:length]
