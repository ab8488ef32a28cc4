"""Texts of TCP addresses, IPv4 and IPv6."""

from __future__ import annotations

import pytest

from pscluster.address import is_loopback, join_address, split_address
from pscluster.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:9090", "127.0.0.1", 9090), ("[::1]:0", "::1", 0), ("master.lan:7070", "master.lan", 7070)],
)
def test_an_address_is_split_and_joined(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)
    assert join_address(host, port) == text


@pytest.mark.parametrize("text", ["", "host", "host:", ":7070", "host:x", "host:65536", "[]:1"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        split_address(text)


def test_brackets_are_not_doubled_and_a_range_is_kept() -> None:
    assert join_address("[fd00::1]", "7100-7199") == "[fd00::1]:7100-7199"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "10.0.0.1", "fd00::1", "0.0.0.0", "::", "localhost.lan", "master"])
def test_what_other_hosts_may_reach_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)
