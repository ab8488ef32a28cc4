"""The two ends of a connection that is measured: a listener for one peer, and the dialler. Both block.

Only the peer with the token of this probe is served; in a secured cluster both ends show their node's certificate over
TLS, as jobs do, so what is measured is what jobs get."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from pscluster.address import join_address, split_address
from pscluster.agent.addresses import LOOPBACK
from pscluster.agent.probe import session
from pscluster.agent.probe.session import MeasuredPair, ProbeLimits, TimedSocket
from pscluster.errors import AddressInUseError, AuthError, PsError
from pscluster.reachability import unreachable
from pscluster.security import tls
from pscluster.security.credentials import CredentialSource
from pscluster.security.identity import Role

ANY_PORT = range(1)
"""Port 0: the kernel chooses."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ListenPlace:
    """Where this node listens for others: a literal address, and the ports that a firewall lets through. `source`: the
    node's credentials; None in a cluster without certificates."""

    host: str = LOOPBACK
    ports: Iterable[int] = ANY_PORT
    source: CredentialSource | None = field(default=None, repr=False)


class OpenSockets:
    """The sockets on which threads wait, so that another thread can end that."""

    def __init__(self) -> None:
        self._sockets: set[socket.socket] = set()
        self._closed = False

    @contextmanager
    def holding(self, sock: socket.socket) -> Iterator[socket.socket]:
        """`shut` wakes whoever waits on the socket meanwhile. Closes it at the end. Raises ConnectionAbortedError after
        `shut`."""
        with sock:
            self._sockets.add(sock)
            try:
                if self._closed:
                    raise ConnectionAbortedError("this agent ends")
                yield sock
            finally:
                self._sockets.discard(sock)

    def shut(self) -> None:
        """End every call on every socket with an error, now and later. Safe to repeat."""
        self._closed = True
        for sock in list(self._sockets):
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not that of SSLSocket, which is not thread-safe
            except OSError as error:
                _log.debug("a socket was closed before", error=str(error))


class PairListener:
    """Listens from its creation until `serve` returns. Raises AddressInUseError when every port is taken."""

    def __init__(self, place: ListenPlace, sockets: OpenSockets) -> None:
        self._source = place.source
        self._sockets = sockets
        self._socket = _listening(place.host, place.ports)

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return join_address(host, port)

    def serve(self, token: str, peer: str, limits: ProbeLimits) -> None:
        """Wait for the peer, serve it to its end, and stop listening. Blocks for `limits.wait_s` and `total_s` at most.
        Others are turned away. Raises TimeoutError when the peer does not come, OSError or FrameError when it breaks
        off."""
        until_s = time.monotonic() + limits.wait_s
        with self._sockets.holding(self._socket):
            while (left_s := until_s - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                accepted, _ = self._socket.accept()
                with self._sockets.holding(_wrapped(accepted, self._source, listens=True)) as opened:
                    if self._admits(opened, token, peer, limits):
                        session.serve(TimedSocket(opened, time.monotonic() + limits.total_s), limits)
                        return
        raise TimeoutError("only others connected")

    def _admits(self, opened: socket.socket, token: str, peer: str, limits: ProbeLimits) -> bool:
        """Whether the peer has connected, and not somebody else."""
        try:
            _authenticate(opened, peer, self._source, limits)
            session.admit(TimedSocket(opened, time.monotonic() + limits.connect_s), token)
        except (OSError, PsError) as error:
            _log.warning("turned a connection away that is not of this probe", peer=peer, cause=str(error))
            return False
        return True


def dial(
    address: str, token: str, peer: str, limits: ProbeLimits, source: CredentialSource | None, sockets: OpenSockets
) -> MeasuredPair:
    """Connect to a peer's listener and measure. Blocks for a few times `limits.connect_s`, and `total_s`, at most.
    Raises UnreachableError with the reason, AuthError."""
    try:
        plain = socket.create_connection(split_address(address), timeout=limits.connect_s)
        with sockets.holding(_wrapped(plain, source, listens=False)) as opened:
            _authenticate(opened, peer, source, limits)
            session.present(TimedSocket(opened, time.monotonic() + limits.connect_s), token)
            return session.measure(TimedSocket(opened, time.monotonic() + limits.total_s), limits)
    except OSError as error:
        raise unreachable(error, f"the probe of {peer}", address) from None


def _listening(host: str, ports: Iterable[int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    why = "no port is given"
    for port in ports:
        try:
            return socket.create_server((host, port), family=family, backlog=4)
        except OSError as error:
            why = error.strerror or str(error)
    raise AddressInUseError(f"cannot listen on {host} for a probe: {why}", action="widen --data-ports")


def _wrapped(connected: socket.socket, source: CredentialSource | None, *, listens: bool) -> socket.socket:
    """The socket, which the result owns, or TLS over it, before its handshake."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if source is None:
        return connected
    context = tls.server_context(source.get()) if listens else tls.client_context(source.get())
    return context.wrap_socket(connected, server_side=listens, do_handshake_on_connect=False)


def _authenticate(opened: socket.socket, peer: str, source: CredentialSource | None, limits: ProbeLimits) -> None:
    """The TLS handshake, where there are certificates. Raises OSError; AuthError unless the other end is the node
    `peer` of this cluster."""
    opened.settimeout(limits.connect_s)
    if not isinstance(opened, ssl.SSLSocket) or source is None:
        return
    opened.do_handshake()
    found, own = tls.identity_of(opened), source.get().identity
    if (found.cluster_id, found.name) != (own.cluster_id, peer) or found.role not in (Role.WORKER, Role.SERVER):
        raise AuthError(f"the other end is {found.uri}, not the node {peer}", action="see `psctl certs list`")
