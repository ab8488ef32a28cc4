"""Addresses and sockets of the data plane: "unix:/path", "tcp:host:port" and "tcp:[host]:port" for IPv6."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from pscluster.address import join_address
from pscluster.errors import AddressInUseError, FrameError, StateError

if TYPE_CHECKING:
    from pscluster.wire.tls import TlsStream

_BACKLOG = 512
DEAD_S = 10
"""After so long without an acknowledgement the kernel closes a TCP connection. By default one over a dead path would
look open for a quarter of an hour."""
_PROBES = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2))  # of a silent one, in seconds


def transport_of(address: str) -> str:
    """The name of an address's transport, as `network.transport` and `psctl describe` spell it.

    Over a Unix socket the two ends may agree on shared memory, "shm", in their handshake."""
    return address.partition(":")[0]


def choose_address(addresses: list[str], transport: str) -> str:
    """The address to dial: the first of the wanted transport; with "auto" a Unix socket that exists here, else TCP.

    Shared memory is arranged over a Unix socket. Raises FrameError when the partition offers none."""
    wanted = "unix" if transport == "shm" else transport
    for address in addresses:
        kind, _, rest = address.partition(":")
        if wanted == kind or (wanted == "auto" and (kind != "unix" or os.path.exists(rest))):
            return address
    raise FrameError(f"no {transport} address among {addresses}", details={"field": "address"})


def tcp_address(host: str, port: int | str) -> str:
    """The address of a TCP port; `host` with or without the brackets of IPv6. `port` "A-B": to bind, one of these."""
    return f"tcp:{join_address(host, port)}"


def bind(address: str) -> tuple[socket.socket, str]:
    """A listening non-blocking socket and the address that peers dial: port 0 resolved, of a range "A-B" the first port
    that is free. Raises AddressInUseError, OSError."""
    kind, _, rest = address.partition(":")
    try:
        if kind == "unix":
            listener = _bind_unix(rest)
            bound = address
        else:
            host, _, ports = rest.rpartition(":")
            listener = _bind_tcp(host.strip("[]"), ports)
            bound = tcp_address(host, listener.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(f"{address} is in use") from None
        raise
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener, bound


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o660)  # its directory says who may come here; a group may have been admitted
    except OSError:
        listener.close()
        raise
    return listener


def _bind_tcp(host: str, ports: str) -> socket.socket:
    first, _, last = ports.partition("-")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(int(first), int(last or first) + 1):
        try:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection; None when its peer has closed it meanwhile. Raises OSError when descriptors run out."""
    try:
        sock, _ = listener.accept()
    except (BlockingIOError, ConnectionAbortedError):
        return None
    return _tune(sock)


def start_dial(address: str) -> tuple[socket.socket, bool]:
    """Begin to connect without blocking; returns the socket and whether it is connected already. Raises OSError."""
    kind, _, rest = address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: str | tuple[str, int] = rest
    else:
        host, _, port = rest.rpartition(":")
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        target = (host.strip("[]"), int(port))
    sock.setblocking(False)
    try:
        code = sock.connect_ex(target)
    except OSError:  # no such host, or a path that is too long
        sock.close()
        raise
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, os.strerror(code))
    return _tune(sock), code == 0


def check_congestion_control(name: str | None) -> None:
    """Raises StateError when TCP on this host does not offer the algorithm of this name; None is its default."""
    if name is None:
        return
    with socket.socket(socket.AF_INET) as probe:
        try:
            control_congestion(probe, name)
        except OSError:
            offered = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
            raise StateError(
                f"TCP on this host has no congestion control {name!r}; it offers {', '.join(offered)}",
                action="choose another network.congestion_control, or load the kernel module tcp_" + name,
            ) from None


def control_congestion(sock: socket.socket | TlsStream, name: str) -> None:
    """Have a TCP socket use this algorithm for what it sends; a Unix socket has none. Raises OSError."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def _tune(sock: socket.socket) -> socket.socket:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_S * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock
