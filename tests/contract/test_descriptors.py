"""Descriptors beside frames, over Unix sockets: they come with their frame to who takes them, and never stay open."""

from __future__ import annotations

import array
import gc
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from harness.wire import MIB, Recorder, World, header, num_descriptors
from pscluster.wire.connection import Connection
from pscluster.wire.frame import FrameKind, Header, checksum, pack


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A Unix connection; descriptors are counted, so that nothing old must be freed meanwhile."""
    gc.disable()
    made = World.create("unix", tmp_path)
    yield made
    made.reactor.close()
    gc.enable()


def send_fds(peer: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    assert peer.sendmsg([data], [rights]) == len(data)


def framed(body: bytes = b"", *, step: int = 1) -> bytes:
    length, check = len(body), checksum([body]) if body else 0
    return pack(Header(kind=FrameKind.VALUES, job=1, step=step, length=length, checksum=check)) + body


def test_descriptors_come_with_their_frame_to_who_dialled(world: World) -> None:
    """The sender may close its own at once: copies are on their way."""
    connection = world.accepted(world.dial())
    before = num_descriptors()
    for step in range(3):
        reading, writing = os.pipe()
        connection.send(header(step), [b"x" * step], fds=[reading, writing])
        os.close(reading)
        os.close(writing)
    world.dialling.on_frame = lambda c, _: world.dialling.fds.extend(c.take_fds())
    world.until(lambda: len(world.dialling.frames) == 3)

    assert len(world.dialling.fds) == 6 and num_descriptors() == before + 6
    for reading, writing in zip(world.dialling.fds[::2], world.dialling.fds[1::2], strict=True):
        os.write(writing, b"hi")
        assert os.read(reading, 2) == b"hi"
        os.close(reading)
        os.close(writing)


def test_received_descriptors_end_with_the_process_that_took_them(world: World) -> None:
    """A child that is started afterwards does not keep the memory of a job alive."""
    world.dialling.takes = True
    connection = world.accepted(world.dial())
    connection.send(header(1), fds=[0])
    world.until(lambda: bool(world.dialling.fds))
    inheritable = os.get_inheritable(world.dialling.fds[0])
    os.close(world.dialling.fds.pop())

    assert not inheritable


def test_descriptors_behind_a_frame_that_waits_come_with_their_own(world: World) -> None:
    seen: dict[int, int] = {}
    dialled = world.dial()
    connection = world.accepted(dialled)
    dialled.pause_reading()
    world.dialling.on_frame = lambda c, h: seen.update({h.step: len(_closed(c.take_fds()))})
    before = num_descriptors()
    for step, fds in enumerate(([], [0], [0, 0], [])):
        connection.send(header(step), [bytes(4 * MIB)], fds=fds)
    assert num_descriptors() == before + 3, "copies wait with their frames"
    dialled.resume_reading()
    world.until(lambda: len(seen) == 4)

    assert seen == {0: 0, 1: 1, 2: 2, 3: 0}
    assert num_descriptors() == before


def _closed(fds: list[int]) -> list[int]:
    for fd in fds:
        os.close(fd)
    return fds


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_what_waits_when_a_connection_ends_is_closed(who: str, world: World) -> None:
    before = num_descriptors()
    dialled = world.dial()
    connection = world.accepted(dialled)
    dialled.pause_reading()
    for step in range(5):
        connection.send(header(step), [bytes(MIB)], fds=[0, 0])
    (connection if who == "sender" else dialled).close()
    dialled.resume_reading()
    world.until(lambda: bool(world.listening.ends and world.dialling.ends))

    assert num_descriptors() == before


def test_on_a_closed_connection_no_copy_is_made(world: World) -> None:
    connection = world.dial()
    connection.close()
    before = num_descriptors()
    connection.send(header(1), [b"x"], fds=[0, 0])

    assert num_descriptors() == before


# ---- where none are expected ----


def both_sides(world: World) -> list[tuple[socket.socket, Recorder]]:
    """A raw peer to who listens, which takes none, and one to who dialled, which may."""
    return [(world.raw(), world.listening), (world.raw_listener()[1], world.dialling)]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 250])
def test_descriptors_that_nobody_takes_are_closed_however_many(count: int, world: World) -> None:
    for peer, hears in both_sides(world):
        with peer:
            hears.frames.clear()
            peer.sendall(framed(step=0))
            world.until(lambda: bool(hears.frames))  # noqa: B023 - called at once
            before = num_descriptors()
            send_fds(peer, framed(b"body"), [0] * count)
            world.until(lambda: len(hears.frames) == 2)  # noqa: B023
            assert num_descriptors() == before
            peer.sendall(framed(b"next", step=2))
            world.until(lambda: len(hears.frames) == 3)  # noqa: B023
            assert [body for _, body in hears.frames] == [b"", b"body", b"next"]


@pytest.mark.parametrize("count", [2, 3, 200])
def test_no_more_than_two_are_taken_with_one_message(count: int, world: World) -> None:
    world.dialling.takes = True
    _, peer = world.raw_listener()
    before = num_descriptors()
    with peer:
        send_fds(peer, framed(), [0] * count)
        world.until(lambda: bool(world.dialling.frames))
        assert len(world.dialling.fds) == 2 == num_descriptors() - before
        _closed(world.dialling.fds)


def test_descriptors_that_come_late_in_a_frame_are_closed(world: World) -> None:
    """With each byte of the header, and with the body."""
    for peer, hears in both_sides(world):
        with peer:
            hears.frames.clear()
            peer.sendall(framed(step=0))
            world.until(lambda: bool(hears.frames))  # noqa: B023
            before = num_descriptors()
            for byte in framed(b"body"):
                send_fds(peer, bytes([byte]), [0, 0])
                world.reactor.poll(0)
            world.until(lambda: len(hears.frames) == 2)  # noqa: B023
            assert num_descriptors() == before
            assert hears.frames[1][1] == b"body"


@pytest.mark.parametrize("sent", [b"P", framed()[:63], framed(b"body")[:-1], b"nonsense" * 10])
def test_a_connection_that_ends_in_mid_frame_closes_what_came(sent: bytes, world: World) -> None:
    for peer, hears in both_sides(world):
        ends, before = len(hears.ends), num_descriptors()
        with peer:
            send_fds(peer, sent, [0, 0])
            world.reactor.poll(0.01)
        world.until(lambda: len(hears.ends) > ends)  # noqa: B023
        assert num_descriptors() == before - 2, "both sockets are closed, too"


def test_a_frame_that_is_refused_closes_what_came(world: World) -> None:
    def refuse(connection: Connection, _header: Header) -> None:
        connection.close()

    for peer, hears in both_sides(world):
        ends, before = len(hears.ends), num_descriptors()
        hears.on_frame = refuse
        with peer:
            send_fds(peer, framed(), [0, 0])
            world.until(lambda: len(hears.ends) > ends)  # noqa: B023
        assert num_descriptors() == before - 2


def test_nothing_is_left_of_a_thousand_connections_that_share_memory(tmp_path: Path) -> None:
    world = World.create("shm", tmp_path)
    world.dial().close()
    world.until(lambda: len(world.listening.ends) == 1)
    gc.collect()  # what is left of other tests must not be freed meanwhile
    before = num_descriptors()
    for number in range(1000):
        connection = world.dial()
        world.give(connection, header(number), [b"gradient"])
        world.until(lambda: len(world.listening.frames) == number + 1)  # noqa: B023
        connection.close()
        world.until(lambda: len(world.listening.ends) == number + 2)  # noqa: B023

    assert num_descriptors() == before
    world.reactor.close()
