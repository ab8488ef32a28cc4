"""TLS 1.3 contexts from credentials in memory. Both ends show a certificate of the cluster's authority."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from typing import Any

from pscluster.errors import AuthError
from pscluster.security.credentials import Credentials
from pscluster.security.identity import Identity


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """For accepting connections: the client's certificate is required. Its identity is the caller's to check."""
    return _context(ssl.PROTOCOL_TLS_SERVER, credentials)


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """For dialling: the server's certificate is verified; its identity is the caller's to check, not a host name."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, credentials)


def joining_context(authority_pem: bytes | None) -> ssl.SSLContext:
    """For a client without credentials. None: the server is not verified, nothing secret may be sent to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    if authority_pem is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=authority_pem.decode())
    return context


def public_server_context(credentials: Credentials) -> ssl.SSLContext:
    """For accepting connections of clients without a certificate: the join endpoint."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, credentials)
    context.verify_mode = ssl.CERT_NONE
    return context


def identity_of(tls: ssl.SSLObject | ssl.SSLSocket) -> Identity:
    """The identity of the peer after the handshake. Raises AuthError."""
    found: dict[str, Any] = tls.getpeercert() or {}
    names: Iterable[tuple[str, str]] = found.get("subjectAltName", ())
    uris = [value for kind, value in names if kind == "URI"]
    if len(uris) != 1:
        raise AuthError("the peer's certificate has no identity of a member", details={"field": "uri"})
    return Identity.parse(uris[0])


def _context(protocol: int, credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=credentials.authority_pem.decode())
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no session is resumed: certificates are checked anew each time
    # `ssl` loads a key from a file alone: one without a name, in memory, which is gone when it was read.
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, credentials.key_pem + credentials.certificate_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    except ssl.SSLError as error:
        raise AuthError(f"the credentials of {credentials.identity.name} do not fit together: {error}") from None
    finally:
        os.close(descriptor)
    return context
