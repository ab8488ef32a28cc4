"""Why a connection could not be made, in words that say which of the usual causes it is. Pure."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Mapping
from typing import Literal

from pscluster.errors import UnreachableError

Reason = Literal["dns", "refused", "timed out", "no route", "tls", "closed", "other"]

_ROUTES = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EADDRNOTAVAIL})
WORDS: Mapping[Reason, str] = {
    "dns": "the name does not resolve",
    "refused": "the connection is refused: nothing listens there",
    "timed out": "it did not answer in time",
    "no route": "there is no route to it",
}
"""For a person, of the reasons that need no more."""
_ACTIONS: Mapping[Reason, str] = {
    "dns": "check the name, or give a literal address",
    "refused": "check that it runs there and listens at this address and port",
    "timed out": "check that a firewall lets this port through (`psctl network rules`), and that the host is up",
    "no route": "check the address, and that this host has a route to it",
    "tls": "check that both are members of the same cluster, and both clocks",
    "closed": "see its log: it closed the connection before it answered",
}


def reason_of(error: BaseException) -> Reason:
    """The cause of an OSError of `socket`, `ssl` or asyncio."""
    if isinstance(error, socket.gaierror):
        return "dns"
    if isinstance(error, ssl.SSLEOFError):
        return "closed"
    if isinstance(error, ssl.SSLError):
        return "tls"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, ConnectionError):
        return "closed"
    if isinstance(error, OSError) and error.errno in _ROUTES:
        return "no route"
    return "other"


def unreachable(error: BaseException, what: str, address: str) -> UnreachableError:
    """The error for a person. `what`: whom was dialled, "the master"; `address`: where."""
    reason = reason_of(error)
    return because(reason, _words(error, reason), what, address)


def because(
    reason: Reason, words: str, what: str, address: str, details: Mapping[str, str] | None = None
) -> UnreachableError:
    """The error for a known reason. `address`: empty if it is not known."""
    where = f" at {address}" if address else ""
    return UnreachableError(
        f"cannot connect to {what}{where}: {words}",
        action=_ACTIONS.get(reason, ""),
        details={"reason": reason, "address": address, **(details or {})},
    )


def _words(error: BaseException, reason: Reason) -> str:
    if reason in WORDS:
        return WORDS[reason]
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: its certificate was refused here: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        # An alert is what the other side sent; all else was found here.
        side = "it refused this side" if "alert" in str(error.reason).lower() else "the handshake failed here"
        return f"TLS: {side}: {(error.reason or str(error)).lower().replace('_', ' ')}"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
