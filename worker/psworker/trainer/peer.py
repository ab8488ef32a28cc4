"""A trainer's two connections to one partition: gradients on one, values on the other. On the reactor's thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pscluster.errors import FrameError, PsError
from pscluster.v1.plan_pb2 import PartitionPlacement
from pscluster.wire.connection import Connection
from pscluster.wire.dialer import ReconnectingConnection
from pscluster.wire.frame import IN_MEMORY, Buffer, FrameKind, Header, in_lane
from pscluster.wire.protocol import Ack, Channel, Hello, Welcome, process_id
from pscluster.wire.reactor import Reactor
from pscluster.wire.transport import transport_of
from psworker.trainer.gradients.send_queue import Lane, SendQueue, SharedLanes
from psworker.trainer.values import Values
from psworker.trainer.work import Agenda

_RETRY_S = (0.02, 1.0)


@dataclass(eq=False)
class Peer:
    """One partition at its plan's addresses, until it is closed. Pending frames outlive a connection."""

    reactor: Reactor
    agenda: Agenda
    lanes: SharedLanes
    values: Values
    receive: Callable[[Header, memoryview], None]  # takes a DIRECTIVE, MERGED or ARBITRATE
    placement: PartitionPlacement
    wanted_transport: str  # as `network.transport` of the spec

    def __post_init__(self) -> None:
        self.pushes = PushChannel(self)
        self.pulls = PullChannel(self)
        process = process_id(self.agenda.job_id, "partition", self.index, self.placement.attempt)
        for channel in (self.pushes, self.pulls):
            channel.line.follow(list(self.placement.addresses), process)

    @property
    def index(self) -> int:
        return self.placement.index

    @property
    def is_connected(self) -> bool:
        return self.pushes.line.connection is not None and self.pulls.line.connection is not None

    @property
    def transport(self) -> str:
        """As `network.transport` spells it; "shm": the partition shares memory."""
        shares = self.pushes.shares_memory or self.pulls.shares_memory
        return "shm" if shares else transport_of(self.pulls.line.dialed)

    @property
    def reconnects(self) -> int:
        """How many connections were lost."""
        return self.pushes.losses + self.pulls.losses

    def unreached_s(self, now_s: float) -> float:
        """For how long nothing at the partition's addresses has taken a connection, by the monotonic clock; 0: there is
        one of each kind. From any thread."""
        return max(self.pushes.line.unreached_s(now_s), self.pulls.line.unreached_s(now_s))

    @property
    def failure(self) -> PsError | None:
        """Why one of the connections cannot be made."""
        return self.pushes.line.failure or self.pulls.line.failure

    def close(self) -> None:
        """Close the connections and stop dialing."""
        self.pushes.line.close()
        self.pulls.line.close()


class _Channel:
    """What both connections have in common."""

    name: Channel
    kinds: frozenset[FrameKind]

    def __init__(self, peer: Peer) -> None:
        self.losses = 0  # of connections that the partition had accepted
        self.shares_memory = False
        self._peer = peer
        self._is_accepted = False
        self.line = ReconnectingConnection(
            peer.reactor, self, self._make_hello, channel=self.name, kinds=self.kinds, transport=peer.wanted_transport,
            retry_s=_RETRY_S, body_target=self._body_target,
        )  # fmt: skip

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - Receiver's signature
        welcome = Welcome.unpack(body)
        assert self.line.connection is not None
        fds = self.line.connection.take_fds()
        for surplus in fds[1:]:
            os.close(surplus)
        self._is_accepted, self.shares_memory = True, bool(fds)
        self._begin(welcome, fds[0] if fds else None)

    def lost(self, error: PsError | None) -> None:  # noqa: ARG002 - it is dialed again whatever it was
        if self._is_accepted:
            self._is_accepted = self.shares_memory = False
            self.losses += 1

    def frame(self, header: Header, body: memoryview) -> None:
        """One of `kinds`."""
        raise NotImplementedError

    def _make_hello(self, connection: Connection) -> tuple[Header, Hello]:
        share = connection.is_local and self._peer.wanted_transport in ("auto", "shm")
        return self._peer.agenda.make_hello(self.name, share=share, num_lanes=self._peer.lanes.num_lanes)

    def _begin(self, welcome: Welcome, fd: int | None) -> None:
        """`fd`: memory that the partition shares over this connection; to be taken over."""
        raise NotImplementedError

    def _body_target(self, header: Header) -> memoryview | None:  # noqa: ARG002 - Dialer's signature
        return None


class PushChannel(_Channel):
    """Sends what `queue` admits, whenever it may admit more."""

    name = "push"
    kinds = frozenset({FrameKind.ACK})

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self.queue = SendQueue()
        self._is_sending = False

    def enqueue(self, order: int, header: Header, parts: Sequence[Buffer], lane: Lane | None) -> None:
        """Send a frame, as soon as it may be sent. Its buffers stay as they are until the partition has them."""
        self.queue.add(order, header, parts, lane)
        self.send_pending()

    def send_pending(self) -> None:
        """Send as far as the credit and the socket allow."""
        connection = self.line.connection
        if connection is None or self._is_sending:
            return
        self._is_sending = True
        while connection.is_open and not connection.wants_write:
            frame = self.queue.next()
            if frame is None:
                break
            if frame.lane is not None and self.queue.is_shared(frame):
                connection.send(replace(frame.header, flags=in_lane(frame.lane.number)))
            else:
                connection.send(frame.header, frame.parts, on_sent=self._send_soon)
        self._is_sending = False

    def _send_soon(self) -> None:
        self._peer.reactor.post(self.send_pending)

    def frame(self, header: Header, body: memoryview) -> None:
        ack = Ack.unpack(body)
        self.queue.granted_bytes = ack.granted_bytes
        if ack.kind in (None, FrameKind.PUSH):  # the answers to other kinds do not know it
            self.queue.open_bucket = ack.open_bucket
        if ack.kind is not None:
            self.queue.acknowledged((ack.kind, header.step, header.bucket, header.node.first, header.node.leaves))
        self.send_pending()

    def lost(self, error: PsError | None) -> None:
        super().lost(error)
        self._peer.lanes.unmap(self._peer.index)

    def _begin(self, welcome: Welcome, fd: int | None) -> None:
        lanes = self._peer.lanes.map(self._peer.index, fd, welcome.num_lanes) if fd is not None else None
        self.queue.reconnected(welcome.granted_bytes, welcome.open_bucket, lanes)
        self.send_pending()


class PullChannel(_Channel):
    """Receives values, straight into the model's memory, and from partition 0 what the coordinator sends."""

    name = "pull"
    kinds = frozenset({FrameKind.VALUES, FrameKind.DIRECTIVE, FrameKind.MERGED, FrameKind.ARBITRATE})

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self._scratch = bytearray()

    def pull(self) -> None:
        """Ask for what is missing of the wanted version, if connected; done again at each welcome."""
        connection, wanted = self.line.connection, self._peer.values.wanted_from(self._peer.index)
        if connection is not None and wanted is not None:
            step, flags = wanted
            connection.send(self._peer.agenda.header(FrameKind.PULL, step=step, flags=flags))

    def frame(self, header: Header, body: memoryview) -> None:
        if header.kind is not FrameKind.VALUES:
            self._peer.receive(header, body)
            return
        in_memory = bool(header.flags & IN_MEMORY)
        if in_memory == bool(header.length):
            where = "in memory" if in_memory else f"of {header.length} bytes"
            raise FrameError(f"values {where} on a pull connection", details={"field": "flags"})
        if in_memory:
            self._peer.values.shown(self._peer.index, header)
        else:
            self._peer.values.landed(self._peer.index, header)

    def _begin(self, welcome: Welcome, fd: int | None) -> None:
        if fd is not None:
            self._peer.values.map(self._peer.index, fd)
        self._peer.agenda.welcomed(self._peer.index, needs_values=welcome.needs_values)
        self.pull()

    def _body_target(self, header: Header) -> memoryview | None:
        if header.kind is not FrameKind.VALUES or header.flags & IN_MEMORY:
            return None
        target = self._peer.values.target(self._peer.index, header)
        return self._discard(header.length) if target is None else target

    def _discard(self, length: int) -> memoryview:
        if len(self._scratch) < length:
            self._scratch = bytearray(length)
        return memoryview(self._scratch)[:length]
