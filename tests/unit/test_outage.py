"""Why a call reached nobody, from the texts that gRPC gives."""

from __future__ import annotations

import pytest

from pscluster.errors import UnreachableError
from pscluster.rpc.outage import outage, reason_in

ALL = "failed to connect to all addresses; last error: "
VERIFY = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"


TO = f"{ALL}UNKNOWN: ipv4:10.9.9.9:7: "
TEXTS = {
    f"{TO}Failed to connect to remote host: Connection refused": ("refused", "refused"),
    f"{ALL}UNKNOWN: ipv6:%5B::1%5D:1: Failed to connect to remote host: Connection refused (111)": ("refused", ""),
    f"{ALL}FAILED_PRECONDITION: unix:/m: connect failed: addr: unix:/m error: No such file or directory": (
        "refused",
        "nothing listens",
    ),
    "errors resolving no.invalid:7: [field:hostname lookup error:address lookup failed: Domain name not found]": (
        "dns",
        "",
    ),
    "DNS resolution failed for nosuch:7: C-ares status is not ARES_SUCCESS qtype=A name=nosuch": ("dns", ""),
    f"{TO}Failed to connect to remote host: getsockopt(SO_ERROR): No route to host": ("no route", ""),
    f"{TO}connect: Network is unreachable (101)": ("no route", ""),
    f"{TO}Failed to connect to remote host: Timeout occurred: FD Shutdown": ("timed out", ""),
    f"{TO}connection attempt timed out before receiving SETTINGS frame": ("timed out", ""),
    f"{TO}Handshake read failed (Endpoint closing)": ("timed out", ""),
    f"{TO}Handshake read failed (Socket closed)": ("closed", ""),
    f"{TO}Socket closed": ("closed", "this side's certificate"),
    f"{TO}recvmsg:Connection reset by peer": ("closed", ""),
    f"{TO}{VERIFY}CERTIFICATE_VERIFY_FAILED: certificate has expired: OK": (
        "tls",
        "refused here: certificate has expired",
    ),
    f"{TO}{VERIFY}CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate: OK": (
        "tls",
        "refused here: unable to get local issuer certificate",
    ),
    f"{TO}{VERIFY}WRONG_VERSION_NUMBER: Invalid certificate verification context: OK": ("tls", "does not speak TLS"),
    f"{TO}{VERIFY}TLSV1_ALERT_UNKNOWN_CA: Invalid certificate verification context: OK": (
        "tls",
        "refused this side: unknown ca",
    ),
    f"{TO}Custom verification check failed with error: UNAUTHENTICATED: Hostname Verification Check failed.": (
        "tls",
        "another role",
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_reason_and_the_side_are_told(text: str) -> None:
    reason, words = TEXTS[text]
    found, shown = reason_in(text)
    assert found == reason
    assert words in shown
    error = outage(text, "the master", "10.0.0.1:7070")
    assert (error.details["reason"], error.details["address"]) == (reason, "10.0.0.1:7070")
    assert "the master at 10.0.0.1:7070" in error.cause
    assert error.action


def test_a_local_cluster_that_does_not_run_is_started_with_up() -> None:
    text = f"{ALL}FAILED_PRECONDITION: unix:/m: connect failed: addr: unix:/m error: No such file or directory"
    assert outage(text, "the master").action == UnreachableError.default_action


def test_what_is_not_known_is_told_as_it_is() -> None:
    assert reason_in("a new kind of failure") == ("other", "a new kind of failure")
    error = outage("a new kind of failure", "the depot at x")
    assert error.cause == "the depot at x does not answer: a new kind of failure"


def test_a_connection_that_broke_later_is_no_failure_to_connect() -> None:
    error = outage("Socket closed", "the master", "10.0.0.1:7070")
    assert error.details["reason"] == "closed"
    assert "connect to" not in error.cause
