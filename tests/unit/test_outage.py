"""Why a call reached nobody, from the texts that gRPC gives."""

from __future__ import annotations

import pytest

from pscluster.errors import UnreachableError
from pscluster.rpc.outage import outage, reason_in

ALL = "failed to connect to all addresses; last error: "
VERIFY = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        (f"{ALL}UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: Connection refused", "refused", ""),
        (f"{ALL}UNKNOWN: ipv6:%5B::1%5D:1: Failed to connect to remote host: Connection refused (111)", "refused", ""),
        (
            f"{ALL}FAILED_PRECONDITION: unix:/tmp/m: connect failed: addr: unix:/tmp/m error: No such file or directory",
            "refused",
            "nothing listens",
        ),
        (
            "errors resolving nosuch.invalid:7: [field:hostname lookup error:address lookup failed for "
            "nosuch.invalid:7: Domain name not found]",
            "dns",
            "",
        ),
        ("DNS resolution failed for nosuch:7: C-ares status is not ARES_SUCCESS qtype=A name=nosuch", "dns", ""),
        (
            f"{ALL}UNKNOWN: ipv4:10.9.9.9:7: Failed to connect to remote host: getsockopt(SO_ERROR): No route to host",
            "no route",
            "",
        ),
        (f"{ALL}UNKNOWN: ipv4:10.9.9.9:7: connect: Network is unreachable (101)", "no route", ""),
        (f"{ALL}UNKNOWN: ipv4:10.9.9.9:7: Failed to connect to remote host: Timeout occurred", "timed out", ""),
        (
            f"{ALL}UNKNOWN: ipv4:127.0.0.1:4: connection attempt timed out before receiving SETTINGS frame",
            "timed out",
            "",
        ),
        (f"{ALL}UNAVAILABLE: ipv4:127.0.0.1:4: Handshake read failed (Endpoint closing)", "timed out", ""),
        (f"{ALL}UNAVAILABLE: ipv4:127.0.0.1:4: Handshake read failed (Socket closed)", "closed", ""),
        (f"{ALL}UNAVAILABLE: ipv4:127.0.0.1:4: Socket closed", "closed", "certificate of this side"),
        (f"{ALL}UNKNOWN: ipv4:1.1.1.1:4: recvmsg:Connection reset by peer", "closed", ""),
        (
            f"{ALL}UNKNOWN: ipv4:127.0.0.1:4: {VERIFY}CERTIFICATE_VERIFY_FAILED: certificate has expired: OK",
            "tls",
            "refused here: certificate has expired",
        ),
        (
            f"{ALL}UNKNOWN: ipv4:127.0.0.1:4: {VERIFY}CERTIFICATE_VERIFY_FAILED: unable to get local issuer "
            "certificate: OK",
            "tls",
            "refused here: unable to get local issuer certificate",
        ),
        (f"{ALL}UNKNOWN: ipv4:127.0.0.1:4: {VERIFY}WRONG_VERSION_NUMBER: Invalid: OK", "tls", "does not speak TLS"),
        (
            f"{ALL}UNKNOWN: ipv4:127.0.0.1:4: {VERIFY}TLSV1_ALERT_UNKNOWN_CA: Invalid: OK",
            "tls",
            "refused this side: unknown ca",
        ),
        (
            f"{ALL}UNKNOWN: ipv4:127.0.0.1:4: Custom verification check failed with error: UNAUTHENTICATED: Hostname "
            "Verification Check failed.",
            "tls",
            "another role",
        ),
    ],
)
def test_the_reason_and_the_side_are_told(text: str, reason: str, words: str) -> None:
    found, told = reason_in(text)
    assert found == reason
    assert words in told
    error = outage(text, "the master", "10.0.0.1:7070")
    assert (error.details["reason"], error.details["address"]) == (reason, "10.0.0.1:7070")
    assert "the master at 10.0.0.1:7070" in error.cause
    assert error.action


def test_a_local_cluster_that_does_not_run_is_started_with_up() -> None:
    text = f"{ALL}FAILED_PRECONDITION: unix:/tmp/m: connect failed: addr: unix:/tmp/m error: No such file or directory"
    assert outage(text, "the master").action == UnreachableError.default_action


def test_what_is_not_known_is_told_as_it_is() -> None:
    assert reason_in("a new kind of failure") == ("other", "a new kind of failure")
    error = outage("a new kind of failure", "the depot at x")
    assert error.cause == "the depot at x does not answer: a new kind of failure"


def test_a_connection_that_broke_later_is_no_failure_to_connect() -> None:
    error = outage("Socket closed", "the master", "10.0.0.1:7070")
    assert error.details["reason"] == "closed"
    assert "connect to" not in error.cause
