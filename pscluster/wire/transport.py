"""Addresses and sockets of the data plane: "unix:/path" and "tcp:host:port"."""

from __future__ import annotations

import errno
import os
import socket

from pscluster.errors import AddressInUseError, FrameError

_BACKLOG = 512


def transport_of(address: str) -> str:
    """The transport's name, as `network.transport` and `psctl describe` spell it."""
    return address.partition(":")[0]


def choose_address(addresses: list[str], transport: str) -> str:
    """The address to dial: the first of the wanted transport; with "auto" a Unix socket that exists here, else TCP.

    Raises FrameError when the partition offers none."""
    for address in addresses:
        kind, _, rest = address.partition(":")
        if transport == kind or (transport == "auto" and (kind != "unix" or os.path.exists(rest))):
            return address
    raise FrameError(f"no {transport} address among {addresses}", details={"field": "address"})


def bind(address: str) -> tuple[socket.socket, str]:
    """A listening non-blocking socket and the address that peers dial (port 0 resolved)."""
    kind, _, rest = address.partition(":")
    try:
        if kind == "unix":
            listener = _bind_unix(rest)
            bound = address
        else:
            host, _, port = rest.rpartition(":")
            listener = socket.create_server((host, int(port)), backlog=_BACKLOG)
            bound = f"tcp:{host}:{listener.getsockname()[1]}"
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
    except OSError:
        listener.close()
        raise
    return listener


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection; None when the caller went away meanwhile. Raises OSError for want of descriptors."""
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


def _tune(sock: socket.socket) -> socket.socket:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
