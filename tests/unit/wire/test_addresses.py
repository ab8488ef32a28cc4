"""Addresses: which one is dialled, what cannot be bound."""

from __future__ import annotations

import gc
import socket
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest

from pscluster.errors import AddressInUseError, FrameError
from pscluster.wire.transport import bind, choose_address, start_dial, tcp_address, transport_of


@pytest.fixture
def unix(tmp_path: Path) -> str:
    path = tmp_path / "s"
    path.touch()
    return f"unix:{path}"


def test_auto_takes_a_unix_socket_that_exists_here(unix: str) -> None:
    assert choose_address([unix, "tcp:127.0.0.1:1"], "auto") == unix


def test_auto_takes_tcp_when_the_unix_socket_is_elsewhere() -> None:
    assert choose_address(["unix:/nowhere/s", "tcp:127.0.0.1:1"], "auto") == "tcp:127.0.0.1:1"


def test_a_named_transport_is_obeyed(unix: str) -> None:
    assert choose_address([unix, "tcp:127.0.0.1:1"], "tcp") == "tcp:127.0.0.1:1"
    assert choose_address(["tcp:127.0.0.1:1", unix], "unix") == unix


def test_shared_memory_is_arranged_over_the_unix_socket(unix: str) -> None:
    assert choose_address(["tcp:127.0.0.1:1", unix], "shm") == unix


@pytest.mark.parametrize("transport", ["unix", "shm", "auto"])
def test_no_fitting_address_is_an_error(transport: str) -> None:
    with pytest.raises(FrameError, match=f"no {transport} address"):
        choose_address([] if transport == "auto" else ["tcp:127.0.0.1:1"], transport)


def test_an_address_names_its_transport() -> None:
    assert transport_of("unix:/a:b") == "unix"
    assert transport_of("tcp:127.0.0.1:80") == "tcp"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_an_address_in_use_is_named(kind: str, tmp_path: Path) -> None:
    listener, bound = bind(f"unix:{tmp_path}/s" if kind == "unix" else "tcp:127.0.0.1:0")
    try:
        with pytest.raises(AddressInUseError, match="in use"):
            bind(bound)
    finally:
        listener.close()


def test_port_zero_is_resolved() -> None:
    listener, bound = bind("tcp:127.0.0.1:0")
    try:
        port = int(bound.rpartition(":")[2])
        assert bound == f"tcp:127.0.0.1:{port}"
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    finally:
        listener.close()


def test_addresses_of_both_versions_of_ip() -> None:
    assert tcp_address("10.0.0.1", 80) == "tcp:10.0.0.1:80"
    assert tcp_address("fd00::1", 80) == tcp_address("[fd00::1]", 80) == "tcp:[fd00::1]:80"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_is_bound_can_be_dialled(host: str) -> None:
    listener, bound = bind(tcp_address(host, 0))
    with listener:
        assert bound == tcp_address(host, listener.getsockname()[1])
        sock, _ = start_dial(bound)
        with sock, socket.socket(fileno=_accept(listener)) as peer:
            assert peer.getpeername()[:2] == sock.getsockname()[:2]


def _accept(listener: socket.socket) -> int:
    listener.settimeout(5)
    return listener.accept()[0].detach()


def test_of_a_range_the_first_free_port_is_bound() -> None:
    with ExitStack() as stack:
        listener, bound = bind("tcp:127.0.0.1:0")
        stack.enter_context(listener)
        taken = int(bound.rpartition(":")[2])
        ports = f"tcp:127.0.0.1:{taken}-{taken + 20}"
        found = []
        for _ in range(2):
            listener, bound = bind(ports)
            stack.enter_context(listener)
            found.append(int(bound.rpartition(":")[2]))
        assert taken < found[0] < found[1] <= taken + 20
        with pytest.raises(AddressInUseError) as caught:
            bind(f"tcp:127.0.0.1:{taken}-{taken}")
        assert caught.value.action


@pytest.mark.parametrize("address", ["unix:" + "x" * 200, "unix:/nowhere/s"])
def test_what_cannot_be_reached_leaks_no_socket(address: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(OSError, match=r"too long|No such file"):
            start_dial(address)
        with pytest.raises(OSError, match=r"too long|No such file"):
            bind(address)
        gc.collect()
