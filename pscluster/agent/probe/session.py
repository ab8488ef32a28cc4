"""What the two sides of a measured connection send to each other. Blocks; runs in a thread.

    dialler                       listener
    token              ->
                       <-  READY
    PING, 64 bytes     ->
                       <-  the same bytes              (many times)
    UP, then chunks    ->
                       <-  READY, when all have arrived
    DOWN               ->
                       <-  chunks
    END                ->

All chunks have one length, and their first byte says whether another follows."""

from __future__ import annotations

import hmac
import math
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pscluster.errors import AuthError, FrameError

CHUNK_BYTES = 64 * 1024
PING_BYTES = 64
MIN_PINGS = 10
_READY = b"R"
_PING, _UP, _DOWN, _END = b"P", b"U", b"D", b"E"
_MORE, _LAST = 1, 0


@dataclass(frozen=True, kw_only=True)
class ProbeLimits:
    """What one pair may take. `bulk_bytes` and `bulk_s`, whichever comes first, in each direction; `pings` and `ping_s`
    likewise. `wait_s`: how long a listener waits for its peer, which dials as soon as the master has passed the address
    on; `connect_s`: each step until the connection is authenticated; `total_s`: from then on, whatever happens."""

    bulk_bytes: int = 64 << 20
    bulk_s: float = 1.0
    pings: int = 200
    ping_s: float = 0.5
    wait_s: float = 8.0
    connect_s: float = 5.0
    total_s: float = 20.0


@dataclass(frozen=True, kw_only=True)
class MeasuredPair:
    """Of a connection, seen from the dialling side. `round_trip_s` is the median."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float
    round_trip_p99_s: float


class TimedSocket:
    """A blocking socket all of whose calls end by one deadline. Raises TimeoutError then, ConnectionResetError when the
    other side has closed, and any OSError of the socket."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        """`deadline_s`: of the monotonic clock. The caller closes the socket."""
        self._sock = sock
        self._deadline_s = deadline_s

    def send(self, data: bytes | memoryview) -> None:
        self._sock.settimeout(self._left_s())
        self._sock.sendall(data)

    def receive(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.receive_into(buffer)
        return bytes(buffer)

    def receive_into(self, buffer: bytearray) -> None:
        """Fill the buffer."""
        view = memoryview(buffer)
        while len(view):
            self._sock.settimeout(self._left_s())
            count = self._sock.recv_into(view)
            if not count:
                raise ConnectionResetError("the other side closed the connection")
            view = view[count:]

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        return left_s


def present(connection: TimedSocket, token: str) -> None:
    """Authenticate this side, which has dialled. Raises AuthError when the other closes, or says something else."""
    connection.send(token.encode())
    try:
        answer = connection.receive(len(_READY))
    except ConnectionResetError:
        raise AuthError("the other side refused the token of this probe") from None
    if answer != _READY:
        raise AuthError("whoever listens there is not a node that was asked to probe")


def admit(connection: TimedSocket, token: str) -> None:
    """Authenticate the side that has dialled. Raises AuthError."""
    if not hmac.compare_digest(connection.receive(len(token.encode())), token.encode()):
        raise AuthError("a connection without the token of this probe")
    connection.send(_READY)


def measure(connection: TimedSocket, limits: ProbeLimits) -> MeasuredPair:
    """Measure from the side that dialled. Raises OSError."""
    trips_s = _ping(connection, limits)
    round_trip_s = statistics.median(trips_s)
    began_s = time.monotonic()
    connection.send(_UP)
    sent_bytes = _send_chunks(connection, limits)
    connection.receive(len(_READY))
    up_s = time.monotonic() - began_s
    began_s = time.monotonic()
    connection.send(_DOWN)
    received_bytes = _receive_chunks(connection, limits)
    down_s = time.monotonic() - began_s
    connection.send(_END)
    return MeasuredPair(
        up_bytes_per_s=rate(sent_bytes, up_s, round_trip_s),
        down_bytes_per_s=rate(received_bytes, down_s, round_trip_s),
        round_trip_s=round_trip_s,
        round_trip_p99_s=percentile(trips_s, 0.99),
    )


def serve(connection: TimedSocket, limits: ProbeLimits) -> None:
    """The listening side of `measure`, until the other side is done. Raises OSError, FrameError."""
    while (order := connection.receive(1)) != _END:
        if order == _PING:
            connection.send(order + connection.receive(PING_BYTES - 1))
        elif order == _UP:
            _receive_chunks(connection, limits)
            connection.send(_READY)
        elif order == _DOWN:
            _send_chunks(connection, limits)
        else:
            raise FrameError(f"{order!r} is no order of a probe", details={"field": "order"})


def rate(num_bytes: int, elapsed_s: float, round_trip_s: float) -> float:
    """Bytes a second, of a transfer that was timed from its order, or first byte, to the answer to its last. One round
    trip is not transfer; it counts as at most half of the time, since its own measurement varies."""
    return num_bytes / max(elapsed_s - round_trip_s, elapsed_s / 2, 1e-9)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _ping(connection: TimedSocket, limits: ProbeLimits) -> list[float]:
    """The seconds of each round trip, of MIN_PINGS at least."""
    message = _PING + bytes(PING_BYTES - 1)
    trips_s: list[float] = []
    until_s = time.monotonic() + limits.ping_s
    while len(trips_s) < MIN_PINGS or (len(trips_s) < limits.pings and time.monotonic() < until_s):
        began_s = time.monotonic()
        connection.send(message)
        connection.receive(PING_BYTES)
        trips_s.append(time.monotonic() - began_s)
    return trips_s


def _send_chunks(connection: TimedSocket, limits: ProbeLimits) -> int:
    """Send until a limit is reached; how many bytes that were."""
    payload = os.urandom(CHUNK_BYTES - 1)
    chunk = bytes([_MORE]) + payload
    sent_bytes, until_s = 0, time.monotonic() + limits.bulk_s
    while sent_bytes + 2 * CHUNK_BYTES <= limits.bulk_bytes and time.monotonic() < until_s:
        connection.send(chunk)
        sent_bytes += CHUNK_BYTES
    connection.send(bytes([_LAST]) + payload)
    return sent_bytes + CHUNK_BYTES


def _receive_chunks(connection: TimedSocket, limits: ProbeLimits) -> int:
    """Receive up to the last chunk; how many bytes that were. Raises FrameError beyond the limit."""
    buffer, received_bytes = bytearray(CHUNK_BYTES), 0
    while True:
        connection.receive_into(buffer)
        received_bytes += CHUNK_BYTES
        if buffer[0] == _LAST:
            return received_bytes
        if received_bytes >= limits.bulk_bytes:
            raise FrameError("the other side sends more than agreed", details={"field": "chunk"})
