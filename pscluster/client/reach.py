"""Whether an address can be reached from here, and why not."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from pscluster.address import split_address
from pscluster.errors import AuthError
from pscluster.reachability import because, unreachable
from pscluster.rpc import Access
from pscluster.security.identity import Role

if TYPE_CHECKING:  # loads cryptography
    from pscluster.security.credentials import Credentials

_DEADLINE_S = 3.0


def check_reachable(
    address: str, access: Access | None, server: Role, what: str, deadline_s: float = _DEADLINE_S
) -> None:
    """Connect to "host:port" or "unix:/path" and, with a certificate, do the TLS handshake as gRPC does; send nothing.
    Without `access` the connection is all that is tried.
    Returns when `what`, a `server` of the cluster, is reached. Blocks up to `deadline_s` for each step. Raises
    UnreachableError with details["reason"], AuthError when another member answers."""
    try:
        with _connected(address, deadline_s) as plain:
            if access is not None and access.source is not None and not address.startswith("unix:"):
                _shake_hands(plain, address, access.source.get(), server, what)
    except OSError as error:
        raise unreachable(error, what, address) from None


def _connected(address: str, deadline_s: float) -> socket.socket:
    if address.startswith("unix:"):
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        plain.settimeout(deadline_s)
        try:
            plain.connect(address.removeprefix("unix:"))
        except OSError:
            plain.close()
            raise
        return plain
    return socket.create_connection(split_address(address), deadline_s)


def _shake_hands(plain: socket.socket, address: str, own: Credentials, server: Role, what: str) -> None:
    from pscluster.security.tls import client_context, identity_of

    context = client_context(own)
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(plain) as tls:
        found = identity_of(tls)
        if found.role is not server:
            raise AuthError(
                f"{address} is answered by {found.role} {found.name}, not by {what}", details={"address": address}
            )
        # In TLS 1.3 the handshake ends here before the server has looked at this side's certificate. A gRPC server
        # that accepts it sends its settings at once; one that does not closes the connection without an alert.
        if not tls.recv(1):
            raise because("tls", "TLS: it refused this side's certificate", what, address)
