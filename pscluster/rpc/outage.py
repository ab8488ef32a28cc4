"""Why a call reached nobody, read from the text that gRPC gives: DNS, refused, timed out, no route, TLS, closed. Pure.

gRPC's server closes a connection whose certificate it refuses without saying so: then only this can be told, that the
other side closed it."""

from __future__ import annotations

import re

from pscluster.errors import UnreachableError
from pscluster.reachability import WORDS, Reason, because

_CONNECTING = re.compile(r"failed to connect|resol\w+ |name resolution|lookup failed", re.IGNORECASE)
_LOCAL = re.compile(r"\bunix:")
_HANDSHAKE = re.compile(r"handshake failed|SSL_ERROR|verification check failed|Hostname Verification", re.IGNORECASE)
_VERIFY = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]*)")
_ROUTINE = re.compile(r"OPENSSL_internal:([A-Z0-9_]+)")
_CLOSED = "it closed the connection: it is ending, does not accept this side's certificate, or only one side speaks TLS"
_PATTERNS: tuple[tuple[str, Reason], ...] = (
    # In this order: a text about a handshake names the cause of its end, too.
    (r"resol\w+ |name not found|lookup failed", "dns"),
    (r"Connection refused|No such file or directory", "refused"),
    (r"No route to host|Network is unreachable|Host is down", "no route"),
    (r"timed out|timeout|Endpoint closing|deadline", "timed out"),
    (r"Socket closed|closed|Connection reset|Broken pipe|GOAWAY|EOF", "closed"),
)
_ROUTINES = {"WRONG_VERSION_NUMBER": "it does not speak TLS", "UNSUPPORTED_PROTOCOL": "it speaks no TLS 1.3"}


def reason_in(text: str) -> tuple[Reason, str]:
    """The reason in gRPC's text of an UNAVAILABLE call, and words for a person."""
    if _HANDSHAKE.search(text):
        return "tls", _words_on_tls(text)
    for pattern, reason in _PATTERNS:
        if re.search(pattern, text, re.IGNORECASE):
            return reason, WORDS.get(reason, _CLOSED)
    return "other", text


def outage(text: str, server: str, address: str = "") -> UnreachableError:
    """The error for a call that reached nobody, or was cut off. `server`: whom it was for, "the master"; `address`:
    where, if known."""
    reason, words = reason_in(text)
    details = {"grpc_code": "UNAVAILABLE"}
    if not _CONNECTING.search(text):
        return UnreachableError(
            f"{server} does not answer: {text}", details={**details, "reason": reason, "address": address}
        )
    error = because(reason, words, server, address, details)
    if _LOCAL.search(text):
        error.action = UnreachableError.default_action
    return error


def _words_on_tls(text: str) -> str:
    if "ostname" in text:
        return "TLS: its certificate was refused here: it has another role, or is of another cluster"
    verified = _VERIFY.search(text)
    if verified:
        return f"TLS: its certificate was refused here: {verified[1].strip()}"
    routine = _ROUTINE.search(text)
    name = routine[1] if routine else ""
    if "ALERT" in name:
        alert = name.partition("ALERT_")[2].replace("_", " ").lower()
        return f"TLS: it refused this side: {alert}"
    return f"TLS: {_ROUTINES.get(name, name.replace('_', ' ').lower() or 'the handshake failed here')}"
