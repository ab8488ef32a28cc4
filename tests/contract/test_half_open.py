"""Peers that connect and never say who they are: bounded in number, time and memory, while others are served."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness.certificates import credentials
from harness.wire import PROCESS, World, header
from pscluster.errors import FrameError
from pscluster.security.tls import client_context
from pscluster.wire.frame import pack
from pscluster.wire.newcomers import MAX_NEWCOMERS

HELD_BYTES = 100 << 10  # by one that stopped in the middle of a handshake, at most


@pytest.fixture(params=["tcp", "tls"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    made = World.create(request.param, tmp_path, handshake_s=60.0)
    made.listening.on_frame = lambda connection, _: setattr(connection, "context", "known")
    yield made
    made.reactor.close()


@pytest.fixture
def many() -> Iterator[None]:
    """As many descriptors as the host allows."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def first_flight() -> bytes:
    """What a client of TLS sends first."""
    ours, theirs = socket.socketpair()
    with theirs, client_context(credentials(PROCESS)).wrap_socket(ours, do_handshake_on_connect=False) as tls:
        tls.setblocking(False)
        with contextlib.suppress(OSError):
            tls.do_handshake()
        return theirs.recv(1 << 16)


def beginning(world: World) -> bytes:
    """The first flight of the handshake, which the listener answers; without TLS all of a header but its end."""
    return first_flight() if world.transport == "tls" else pack(header(1))[:-1]


def flood(world: World, count: int, say: Callable[[socket.socket], object]) -> int:
    """Open connections of which none goes on; returns how much memory that took."""
    before = psutil.Process().memory_info().rss
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            say(stack.enter_context(world.connect()))
            world.reactor.poll(0)
        world.until(lambda: len(world.listening.ends) >= count - MAX_NEWCOMERS)
        served(world)
        return psutil.Process().memory_info().rss - before


def served(world: World) -> None:
    """Somebody who says HELLO is answered."""
    known = len(world.listening.frames)
    connection = world.dial()
    connection.send(header(7), [b"hello"])
    world.until(lambda: len(world.listening.frames) == known + 1)
    assert connection.is_open


def test_too_many_newcomers_close_the_oldest_and_others_are_served(world: World) -> None:
    first = world.dial()
    first.send(header(1), [b"hello"])
    world.until(lambda: len(world.listening.frames) == 1)
    begun = beginning(world)
    flood(world, MAX_NEWCOMERS + 100, lambda sock: sock.sendall(begun))

    assert first.is_open, "who is known stays"
    crowded = [end for end in world.listening.ends if isinstance(end, FrameError)]
    assert {end.details["reason"] for end in crowded} == {"crowded"} and len(crowded) >= 100


@pytest.mark.slow
@pytest.mark.usefixtures("many")
def test_ten_thousand_half_open_connections_leave_memory_bounded(world: World) -> None:
    begun = beginning(world)
    grown = flood(world, 10_000, lambda sock: sock.sendall(begun))

    assert grown < MAX_NEWCOMERS * HELD_BYTES, f"{grown >> 20} MiB"


def test_one_that_trickles_ends_with_its_time_and_others_are_served(tmp_path: Path, world: World) -> None:
    """Each byte comes in time for the next one; the whole does not."""
    slow = World.create(world.transport, tmp_path, handshake_s=0.2)
    begun = beginning(slow)
    with slow.connect() as peer:
        for byte in begun[:-1]:
            peer.sendall(bytes([byte]))
            slow.reactor.poll(0)
        served(slow)
        slow.until(lambda: bool(slow.listening.ends))
    end = slow.listening.ends[0]
    assert isinstance(end, FrameError) and end.details["field"] == "handshake"
    slow.reactor.close()
