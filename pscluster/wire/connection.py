"""One framed socket: reads frames into memory that the receiver chose, writes without copying.

A `Connection` belongs to the thread of its `Reactor`; only that thread may call it."""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from pscluster.errors import FrameError, PsError
from pscluster.wire.frame import HEADER_BYTES, Buffer, Header, checksum, pack, unpack

if TYPE_CHECKING:
    from pscluster.security.identity import Identity
    from pscluster.wire.tls import TlsStream

_MAX_GATHER = 512  # buffers per sendmsg; Linux takes 1024
_READ_BUDGET_BYTES = 16 << 20  # read from one connection before the next one is served
_WAKE_BYTES = 512 << 10  # of a body over TCP, below which the kernel does not wake us
_CHECK_BYTES = 256 << 10  # of a body whose checksum is computed at a time, while they are in cache
_MAX_FDS = 2  # that may come with a frame
_FD = array.array("i")


class ConnectionHandler(Protocol):
    """What a process does with the frames of a connection. All calls come on the reactor's thread."""

    def body_target(self, connection: Connection, header: Header) -> memoryview:
        """Writable memory of exactly `header.length` bytes for the body; owned by the connection until `frame`.

        Called before anything is allocated for the body. Raises FrameError to refuse, which closes the connection."""

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        """A complete frame whose checksum fits; `body` is what `body_target` returned. A PsError closes."""

    def closed(self, connection: Connection, error: PsError | None) -> None:
        """The connection is closed: by the peer (None), or because of `error`. Called once, maybe within a `send` over
        it or a `close`, whose caller then continues."""


@dataclass
class _Outgoing:
    """One frame on its way. `views` is what is still to be sent; `tag` names the memory behind it."""

    views: list[memoryview]
    tag: object
    on_sent: Callable[[], None] | None
    fds: Sequence[int] = ()  # copies, which go with the first byte


class Connection:
    """A connected non-blocking stream socket, or a `TlsStream` over one, under a reactor. Made by `Reactor.adopt`.

    `takes_fds`: file descriptors that come with a frame (over Unix sockets) are kept for `take_fds`; otherwise the
    kernel drops them."""

    def __init__(
        self,
        sock: socket.socket | TlsStream,
        handler: ConnectionHandler,
        wants: Callable[[Connection], None],
        *,
        takes_fds: bool = False,
        read_soon: Callable[[Connection], None] | None = None,
    ) -> None:
        """`read_soon`: has `readable` called in the next turn; for a TlsStream, which may hold what it has decrypted
        while the kernel has nothing to read."""
        self.socket = sock
        self.tls = None if isinstance(sock, socket.socket) else sock
        self.handler = handler
        self.context: object = None  # the handler's: set once the peer has identified itself
        self.is_open = True
        self.reading = True
        self.sent_bytes = 0
        self._wants = wants  # called when interest in reading or writing may have changed
        self._read_soon = read_soon
        self._outgoing: deque[_Outgoing] = deque()
        self._header_bytes = bytearray(HEADER_BYTES)
        self._into = memoryview(self._header_bytes)
        self._filled = 0
        self._header: Header | None = None
        self._summed = 0  # bytes of the body whose checksum is `_checksum`
        self._checksum = 0
        self._takes_fds = takes_fds and sock.family == socket.AF_UNIX
        self._fds: list[int] = []
        self._wakes_at = 1  # bytes that must be there before the kernel wakes us

    @property
    def is_local(self) -> bool:
        """Whether the other end is on this host for sure, so that memory can be shared with it."""
        return self.socket.family == socket.AF_UNIX

    @property
    def identity(self) -> Identity | None:
        """Of the other end's certificate; None: the connection is not over TLS."""
        return self.tls.identity if self.tls is not None else None

    @property
    def wants_write(self) -> bool:
        return bool(self._outgoing)

    def send(
        self,
        header: Header,
        body: Sequence[Buffer] = (),
        *,
        tag: object = None,
        on_sent: Callable[[], None] | None = None,
        fds: Sequence[int] = (),
        body_checksum: int | None = None,
    ) -> None:
        """Queue one frame and send what the socket takes now. Never blocks. Closes a broken connection at once.

        The buffers of `body` are read until `on_sent` is called, or until `detach(tag)`: the caller must not
        overwrite them before. On a closed connection nothing happens and `on_sent` is never called.
        `fds` are handed to the peer with the frame, over a Unix socket; the caller may close its own on return.
        `body_checksum`: of the body, when the caller knows it."""
        if not self.is_open:
            return
        parts = [memoryview(part).cast("B") for part in body if memoryview(part).nbytes]
        if body_checksum is None:
            body_checksum = checksum(parts) if parts else 0
        header = replace(header, length=sum(p.nbytes for p in parts), checksum=body_checksum)
        copies = [os.dup(fd) for fd in fds]
        self._outgoing.append(_Outgoing([memoryview(pack(header)), *parts], tag, on_sent, copies))
        self.flush()

    def detach(self, tag: object) -> None:
        """Copy what is still to be sent of the frames with this tag, so that their memory may be overwritten."""
        for item in self._outgoing:
            if item.tag == tag and item.tag is not None:
                item.views = [memoryview(bytes(view)) for view in item.views]
                item.tag = None

    def pause_reading(self) -> None:
        """Read no further bytes until `resume_reading`; the peer sees a slow reader."""
        self.reading = False
        self._wants(self)

    def resume_reading(self) -> None:
        self.reading = True
        self._wants(self)
        if self._read_soon is not None:
            self._read_soon(self)

    def flush(self) -> None:
        try:
            while self._outgoing:
                item = self._outgoing[0]
                self._advance(item, self.socket.sendmsg(item.views[:_MAX_GATHER], _ancillary(item.fds)))
                if item.views:
                    continue
                self._outgoing.popleft()
                if item.on_sent is not None:
                    item.on_sent()
        except BlockingIOError:
            pass  # the kernel's buffer is full; the reactor calls again
        except OSError as error:
            self.close(FrameError(f"a data connection broke while sending: {error}"))
            return
        self._wants(self)

    def readable(self) -> None:
        """Read and deliver frames until nothing is left, or the read budget is used up."""
        budget = _READ_BUDGET_BYTES
        try:
            while self.is_open and self.reading and budget > 0:
                count = self._receive()
                if count == 0:
                    self.close(None)
                    return
                budget -= count
                self._filled += count
                if self._header is not None:
                    self._sum_up()
                if self._filled == self._into.nbytes:
                    self._filled_up()
            if self._read_soon is not None and self.is_open and self.reading:
                self._read_soon(self)
        except BlockingIOError:
            pass  # everything read; the reactor calls again
        except OSError as error:
            self.close(FrameError(f"a data connection broke while receiving: {error}"))
        except PsError as error:
            self.close(error)
        if self.is_open:
            self._wait_for_more()

    def take_fds(self) -> list[int]:
        """The file descriptors that came with the frame being handled; the caller's to close."""
        fds, self._fds = self._fds, []
        return fds

    def close(self, error: PsError | None = None) -> None:
        """Close and notify the handler. Idempotent. What was queued and not sent is dropped."""
        if not self.is_open:
            return
        self.is_open = False
        self._wants(self)
        for item in self._outgoing:
            _close_all(item.fds)
        _close_all(self.take_fds())
        self._outgoing.clear()
        self.socket.close()
        self.handler.closed(self, error)

    def _wait_for_more(self) -> None:
        """Have the kernel wake us for a large part of the body instead of each segment; for a header at once."""
        missing = self._into.nbytes - self._filled if self._header is not None else 1
        wake_at = min(missing, _WAKE_BYTES)
        if wake_at != self._wakes_at and self.socket.family != socket.AF_UNIX and self._reads_from_kernel():
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_at)
            self._wakes_at = wake_at

    def _reads_from_kernel(self) -> bool:
        """Whether the bytes that it counts are those of frames."""
        return self.tls is None or self.tls.reads_plainly

    def _receive(self) -> int:
        """Read into the memory to be filled; descriptors come with the first byte of a header."""
        if self._header is not None or not self._takes_fds:
            return self.socket.recv_into(self._into[self._filled :])
        count, ancillary, _, _ = self.socket.recvmsg_into(  # type: ignore[union-attr]  # TLS is not over Unix sockets
            [self._into[self._filled :]], socket.CMSG_SPACE(_MAX_FDS * _FD.itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(data[: len(data) - len(data) % found.itemsize])
                self._fds += found
        return count

    def _sum_up(self) -> None:
        """Add what was received of the body to its checksum, in large pieces."""
        if self._filled - self._summed >= _CHECK_BYTES or self._filled == self._into.nbytes:
            self._checksum = checksum((self._into[self._summed : self._filled],), self._checksum)
            self._summed = self._filled

    def _advance(self, item: _Outgoing, sent: int) -> None:
        self.sent_bytes += sent
        _close_all(item.fds)  # the kernel has taken them with the first byte
        item.fds = ()
        done = 0
        while done < len(item.views) and sent >= item.views[done].nbytes:
            sent -= item.views[done].nbytes
            done += 1
        del item.views[:done]
        if sent:
            item.views[0] = item.views[0][sent:]

    def _filled_up(self) -> None:
        if self._header is None:
            header = unpack(self._header_bytes)
            self._header = header
            if header.length:
                target = self.handler.body_target(self, header)
                if target.nbytes != header.length:
                    raise FrameError(
                        f"{header.kind.name} of {header.length} bytes where {target.nbytes} are expected",
                        details={"field": "length"},
                    )
                self._into, self._filled, self._summed, self._checksum = target, 0, 0, 0
                return
            self._into = self._into[:0]
        self._deliver(self._header)

    def _deliver(self, header: Header) -> None:
        body, self._into, self._filled, self._header = self._into, memoryview(self._header_bytes), 0, None
        if header.length and self._checksum != header.checksum:
            raise FrameError(
                f"the body of a {header.kind.name} frame does not fit its checksum", details={"field": "checksum"}
            )
        self.handler.frame(self, header, body)
        if self._fds:
            _close_all(self.take_fds())  # the handler did not take them


def _ancillary(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
