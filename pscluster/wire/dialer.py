"""A connection that is dialed again whenever it breaks: by a partition to its coordinator and its standby, by a trainer
to each partition."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol

from pscluster.errors import AuthError, FrameError, PsError
from pscluster.wire.backoff import delay_s
from pscluster.wire.connection import Connection
from pscluster.wire.frame import MAX_SMALL_BYTES, FrameKind, Header
from pscluster.wire.protocol import Channel, Hello
from pscluster.wire.reactor import Reactor
from pscluster.wire.transport import choose_address

_FACTOR = 1.5  # by which the wait grows from one failure to the next


class Receiver(Protocol):
    """What a connection is for. Every call comes on the reactor's thread."""

    def welcomed(self, header: Header, body: memoryview) -> None:
        """The other end has accepted: `ReconnectingConnection.connection` is set. A PsError closes the connection."""

    def frame(self, header: Header, body: memoryview) -> None:
        """A frame after WELCOME. A PsError closes the connection."""

    def lost(self, error: PsError | None) -> None:
        """The connection is gone, or was closed before WELCOME; it is dialed again. Maybe within a send over it.

        `error`: what came over it was refused, or it broke; None: the other end closed it."""


class ReconnectingConnection:
    """At most one connection, to the addresses of the last `follow`. On the reactor's thread, but for `unreached_s` and
    `failure`.

    `connection` is set from WELCOME until it is lost. `dialed`: the address that was dialed last. `failure`: why the
    last dial gave no connection, or the other end refused it; None: it has accepted."""

    def __init__(
        self,
        reactor: Reactor,
        receiver: Receiver,
        make_hello: Callable[[Connection], tuple[Header, Hello]],
        *,
        channel: Channel,
        kinds: frozenset[FrameKind],
        transport: str,
        retry_s: tuple[float, float],
        body_target: Callable[[Header], memoryview | None] = lambda _: None,
    ) -> None:
        """`kinds`: what may come after WELCOME. `transport`: as `network.transport` of the spec. `retry_s`: the wait
        before the second dial, and the longest one. `body_target(header)`: memory for a body, None: it is small."""
        self.connection: Connection | None = None
        self.dialed = ""
        self.failure: PsError | None = None
        self._reactor = reactor
        self._receiver = receiver
        self._make_hello = make_hello
        self._channel = channel
        self._kinds = kinds | {FrameKind.WELCOME, FrameKind.FENCED}
        self._transport = transport
        self._first_s, self._cap_s = retry_s
        self._body_target = body_target
        self.addresses: list[str] = []  # what is dialed; empty: nothing
        self.peer = ""  # the process that must answer there, where certificates show who does
        self._pending: Connection | None = None  # its HELLO was sent
        self._dials = 0  # only the newest one counts
        self._failures = 0
        self._unreached_since_s: float | None = None  # monotonic; None: there is a connection, or none is wanted
        self._refused_since_s: float | None = None  # the same, before the pending connection

    def follow(self, addresses: list[str], peer: str = "") -> None:
        """Connect to the process `peer` at these addresses from now on. A connection to others is closed; nothing that
        it sent is read."""
        self.addresses, self.peer = addresses, peer
        self._failures, self.failure = 0, None
        self._dials += 1
        connections, self._pending, self.connection = (self._pending, self.connection), None, None
        for connection in connections:
            if connection is not None:
                connection.close()
        self._unreached_since_s = time.monotonic() if addresses else None
        if addresses:
            self._dial()

    def close(self) -> None:
        """Close the connection; only `follow` dials again."""
        self.follow([])

    def unreached_s(self, now_s: float) -> float:
        """For how long nothing at the addresses has taken a connection, by the monotonic clock. From any thread."""
        since_s = self._unreached_since_s
        return 0.0 if since_s is None else now_s - since_s

    def _dial(self) -> None:
        self._dials += 1
        number = self._dials
        try:
            self.dialed = choose_address(self.addresses, self._transport)
        except FrameError:
            self._retry()
            return
        self._reactor.dial(self.dialed, self, lambda *answer: self._connected(number, *answer), self.peer)

    def _connected(self, number: int, connection: Connection | None, failure: PsError | None) -> None:
        if number != self._dials:
            if connection is not None:
                connection.close()
        elif connection is None:
            self.failure = failure
            self._retry()
        else:
            self._pending = connection
            self._refused_since_s, self._unreached_since_s = self._unreached_since_s, None
            header, hello = self._make_hello(connection)
            connection.send(header, [hello.pack()])

    def _retry(self) -> None:
        self._failures += 1
        number = self._dials
        wait_s = delay_s(self._failures, random.random(), first_s=self._first_s, cap_s=self._cap_s, factor=_FACTOR)
        self._reactor.call_later(wait_s, lambda: self._dial() if number == self._dials else None)

    # ---- the connection's handler ----

    def body_target(self, connection: Connection, header: Header) -> memoryview:  # noqa: ARG002 - Handler's signature
        self._check_kind(header)
        target = self._body_target(header)
        if target is None and header.length > MAX_SMALL_BYTES:
            raise FrameError(f"{header.kind.name} of {header.length} bytes", details={"field": "length"})
        return memoryview(bytearray(header.length)) if target is None else target

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        self._check_kind(header)
        if connection is not self._pending and connection is not self.connection:
            connection.close()  # it was replaced while this was on its way
        elif header.kind is FrameKind.WELCOME:
            self._pending, self.connection, self._failures, self.failure = None, connection, 0, None
            self._receiver.welcomed(header, body)
        else:
            self._receiver.frame(header, body)

    def closed(self, connection: Connection, error: PsError | None) -> None:
        if connection is self.connection or connection is self._pending:
            # A client of TLS learns only after its handshake that its certificate is refused: no connection was taken.
            is_refused = connection is self._pending and isinstance(error, AuthError)
            since_s = self._refused_since_s if is_refused else None
            self._unreached_since_s = since_s if since_s is not None else time.monotonic()
            self._pending, self.connection, self.failure = None, None, error
            self._retry()
            self._receiver.lost(error)

    def _check_kind(self, header: Header) -> None:
        if header.kind not in self._kinds:
            raise FrameError(f"a {header.kind.name} on a {self._channel} connection", details={"field": "kind"})
