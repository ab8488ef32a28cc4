"""Where a partition listens: on the host and the ports that its agent gives it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.jobs import lm_spec
from pscluster.errors import AddressInUseError
from pscluster.job.spec import parse_spec
from pscluster.v1.plan_pb2 import ProcessSpec
from pscluster.wire.reactor import Reactor
from psserver.partition.__main__ import _addresses, _listen

UNUSED: Any = None  # nothing is served here


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()


def listen(reactor: Reactor, **start: object) -> str:
    spec = parse_spec(lm_spec(partitions=1, steps=1, transport="tcp"))
    (address,) = _addresses(spec, ProcessSpec(**start))  # type: ignore[arg-type]
    return _listen(reactor, address, UNUSED)


@pytest.fixture
def held() -> Iterator[int]:
    """A port that is taken, with a free one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            yield port
            return


@pytest.fixture(autouse=True)
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_SOCKET_DIR", str(tmp_path))


def test_without_a_host_it_listens_on_loopback_on_any_port(reactor: Reactor) -> None:
    assert listen(reactor).startswith("tcp:127.0.0.1:")


def test_an_ipv6_host_is_shown_in_brackets(reactor: Reactor) -> None:
    address = listen(reactor, data_host="[::1]")
    assert address.startswith("tcp:[::1]:")
    with socket.create_connection(("::1", int(address.rpartition(":")[2]))):
        pass


def test_the_first_free_port_of_the_range_is_taken(reactor: Reactor, held: int) -> None:
    assert listen(reactor, data_port_first=held, data_port_last=held + 5) == f"tcp:127.0.0.1:{held + 1}"


def test_a_range_without_a_free_port_is_an_error_that_names_the_setting(reactor: Reactor, held: int) -> None:
    assert listen(reactor, data_port_first=held + 1, data_port_last=held + 1) == f"tcp:127.0.0.1:{held + 1}"
    with pytest.raises(AddressInUseError) as caught:
        listen(reactor, data_port_first=held, data_port_last=held + 1)
    assert "--data-ports" in caught.value.action
    assert str(held) in caught.value.cause


def test_an_address_of_another_host_is_a_named_error(reactor: Reactor) -> None:
    with pytest.raises(AddressInUseError, match="cannot listen"):
        listen(reactor, data_host="203.0.113.77")
