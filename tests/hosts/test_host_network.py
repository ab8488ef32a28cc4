"""The hosts of these tests behave as machines do: own addresses and directories, and links that can be cut."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.hosts import Direction, Host, HostNetwork

_RECEIVE = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    sock.bind((sys.argv[1], 4000))
    print("bound", flush=True)
    sock.settimeout(float(sys.argv[2]))
    try:
        print(sock.recvfrom(16)[1][0])
    except TimeoutError:
        print("nothing")
"""
_SEND = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    sock.sendto(b"x", (sys.argv[1], 4000))
"""


@pytest.fixture(scope="module")
def network() -> Iterator[HostNetwork]:
    with HostNetwork(3, families=("ipv4", "ipv6"), rate="1gbit") as made:
        yield made


def received_from(sender: Host, receiver: Host, address: str, wait_s: float = 5.0) -> str:
    """The address from which a datagram arrived, or "nothing"."""
    command = [*receiver.enter, sys.executable, "-c", _RECEIVE, address, str(wait_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiving:
        assert receiving.stdout is not None and receiving.stdout.readline() == "bound\n"
        assert sender.run(sys.executable, "-c", _SEND, address).returncode == 0
        return receiving.stdout.readline().strip()


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_hosts_reach_each_other_at_their_own_addresses(network: HostNetwork, family: int) -> None:
    first, second, _ = network.hosts
    assert received_from(first, second, second.addresses[family]) == first.addresses[family]


def test_a_loopback_address_is_the_hosts_own(network: HostNetwork) -> None:
    first, second, _ = network.hosts
    assert received_from(first, second, "127.0.0.1", wait_s=0.3) == "nothing"


@pytest.mark.parametrize("direction", ["in", "out", "both"])
def test_a_cut_drops_what_it_says_and_heals(network: HostNetwork, direction: Direction) -> None:
    first, second, third = network.hosts
    for host in (second, third):  # both know each other's hardware address: a lost packet is no lost question for it
        assert received_from(first, host, host.address) == first.address
        assert received_from(host, first, first.address) == host.address
    network.cut(first, direction)
    to_first = received_from(second, first, first.address, wait_s=0.3 if direction != "out" else 5.0)
    from_first = received_from(first, second, second.address, wait_s=0.3 if direction != "in" else 5.0)
    assert (to_first == "nothing", from_first == "nothing") == (direction != "out", direction != "in")
    assert received_from(second, third, third.address) == second.address
    assert network.heal(first) > 0
    assert received_from(second, first, first.address) == second.address
    assert received_from(first, second, second.address) == first.address


def test_a_host_changes_its_address(network: HostNetwork) -> None:
    first, second, _ = network.hosts
    network.change_address(second, 9)
    try:
        assert second.addresses == ["10.77.0.10", "fd77::a"]
        for address, own in zip(second.addresses, first.addresses, strict=True):
            assert received_from(first, second, address) == own
    finally:
        network.change_address(second, second.number)


def test_each_host_sees_its_own_directories_and_name_at_the_same_paths(network: HostNetwork) -> None:
    shown = []
    for host in network.hosts:
        done = host.run("sh", "-c", 'echo mine > "$HOME/file"; touch /dev/shm/mine; hostname; ls "$TMPDIR" /dev/shm')
        assert done.returncode == 0, done.stderr
        assert (host.outside / "home" / "file").read_text() == "mine\n"
        shown.append(done.stdout.split()[0])
    assert shown == ["host-0", "host-1", "host-2"]
    assert not Path("/dev/shm/mine").exists() and not (network.root / "home" / "file").exists()


def test_a_started_command_has_the_pid_that_is_returned(network: HostNetwork, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = network.hosts[1].start("sh", "-c", "echo $$", log=log)
    assert process.wait(20) == 0
    assert int(log.read_text()) == process.pid


def test_nothing_is_left_after_a_failure() -> None:
    made = HostNetwork(2)
    with pytest.raises(ZeroDivisionError), made:
        raise ZeroDivisionError
    assert not made.root.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in made.pids)
