"""Which address a node advertises, from its settings, interfaces and routes."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from pscluster.agent import addresses
from pscluster.agent.addresses import (
    Interface,
    NodeAddress,
    PortRange,
    choose_automatically,
    choose_by_interface,
    is_gone,
    is_local,
    literal,
    shown,
)
from pscluster.errors import SettingsError, UnreachableError

LO = Interface(name="lo", address=ipaddress.ip_address("127.0.0.1"))
LO6 = Interface(name="lo", address=ipaddress.ip_address("::1"))
LINK = Interface(name="eth0", address=ipaddress.ip_address("fe80::1"))
ETH = Interface(name="eth0", address=ipaddress.ip_address("10.0.0.5"))
ETH6 = Interface(name="eth0", address=ipaddress.ip_address("fd00::5"))
IB = Interface(name="ib0", address=ipaddress.ip_address("192.168.7.5"))
ALL = [LO, LO6, LINK, ETH6, ETH, IB]


@pytest.mark.parametrize(
    ("text", "first", "last"), [("7100-7199", 7100, 7199), ("7100", 7100, 7100), (" 1 - 65535", 1, 65535)]
)
def test_a_range_of_ports(text: str, first: int, last: int) -> None:
    assert PortRange.parse(text) == PortRange(first=first, last=last)
    assert list(PortRange(first=5, last=7)) == [5, 6, 7]


@pytest.mark.parametrize("text", ["", "0-5", "7-5", "7-", "-7", "a-b", "1-65536", "7100-7199-"])
def test_no_range_of_ports(text: str) -> None:
    with pytest.raises(ValueError, match="data_ports"):
        PortRange.parse(text)


def test_literal_addresses_are_shown_as_they_stand_before_a_port() -> None:
    assert [shown(literal(text)) for text in ("10.0.0.5", "fd00::5", "[fd00::5]")] == [
        "10.0.0.5",
        "[fd00::5]",
        "[fd00::5]",
    ]


@pytest.mark.parametrize("text", ["host.example", "10.0.0", "0.0.0.0", "::", "fe80::1", "224.0.0.1", "10.0.0.5:7000"])
def test_what_others_cannot_dial_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="advertise"):
        NodeAddress(master="10.0.0.1:7070", advertise=text)


@pytest.mark.parametrize(
    ("master", "local"),
    [
        ("unix:/run/m.sock", True),
        ("127.0.0.1:7070", True),
        ("127.8.0.1:7070", True),
        ("localhost:7070", True),
        ("[::1]:7070", True),
        ("10.0.0.1:7070", False),
        ("[fd00::1]:7070", False),
        ("master.example:7070", False),
    ],
)
def test_loopback_may_be_advertised_to_a_local_master_alone(master: str, local: bool) -> None:
    assert is_local(master) == local
    if local:
        assert NodeAddress(master=master, advertise="127.0.0.1").locate() == "127.0.0.1"
    else:
        with pytest.raises(ValueError, match="loopback"):
            NodeAddress(master=master, advertise="127.0.0.1")


def test_the_address_is_given_once() -> None:
    with pytest.raises(ValueError, match="both"):
        NodeAddress(master="10.0.0.1:7070", advertise="10.0.0.5", interface="eth0")


@pytest.mark.parametrize(
    ("wanted", "address"),
    [("ib0", IB), ("eth0", ETH), ("10.0.0.0/24", ETH), ("fd00::/64", ETH6), ("192.168.7.5/24", IB)],
)
def test_an_interface_by_name_or_network(wanted: str, address: Interface) -> None:
    assert choose_by_interface(wanted, ALL) == address.address


@pytest.mark.parametrize("wanted", ["eth1", "lo", "10.1.0.0/16", "127.0.0.0/8"])
def test_a_missing_interface_is_an_error_that_lists_the_others(wanted: str) -> None:
    with pytest.raises(SettingsError, match=r"ib0 \(192.168.7.5\)"):
        choose_by_interface(wanted, ALL)


def test_a_wrong_network_is_an_error() -> None:
    with pytest.raises(SettingsError, match="neither a name nor a network"):
        choose_by_interface("10.0.0.0/99", ALL)


def test_automatically_the_socket_towards_the_master_decides() -> None:
    assert choose_automatically([LO.address, IB.address, ETH.address], ALL) == IB.address


def test_automatically_without_a_route_the_only_interface_is_taken() -> None:
    assert choose_automatically([LO.address], [LO, LO6, LINK, ETH]) == ETH.address


def test_automatically_with_several_and_no_route_a_person_must_choose() -> None:
    with pytest.raises(SettingsError, match="several") as caught:
        choose_automatically([], ALL)
    assert "--advertise" in caught.value.action


def test_a_host_without_a_network_is_alone_with_its_loopback() -> None:
    assert choose_automatically([], [LO, LO6, LINK]) == LO.address


def test_an_address_is_gone_when_no_interface_has_it() -> None:
    assert [is_gone(host, ALL) for host in ("10.0.0.5", "[fd00::5]", "10.0.0.6", "127.0.0.2")] == [
        False,
        False,
        True,
        False,
    ]


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(SettingsError, match="no address of this host"):
        NodeAddress(master="10.0.0.1:7070", advertise="203.0.113.77").locate()


def test_a_name_that_does_not_resolve_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, *_: object, **__: object) -> list[object]:
        if host == "master.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return []

    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolve)
    with pytest.raises(UnreachableError) as caught:
        NodeAddress(master="master.example:7070").locate()
    assert caught.value.details["reason"] == "dns"


def test_a_master_without_a_route_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: [])
    with pytest.raises(UnreachableError) as caught:
        NodeAddress(master="10.0.0.1:7070").locate()
    assert caught.value.details["reason"] == "no route"
