"""How connections end, over every transport: told once, by name where there is one, and with nothing left behind."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.wire import DEADLINE_S, MIB, World, header
from pscluster.errors import FrameError, PsError, VersionSkewError
from pscluster.wire.frame import PROTOCOL, FrameKind, Header, checksum, pack
from pscluster.wire.memory import Segment


def test_closing_is_reported_once_to_both_sides_and_nothing_is_sent_after(world: World) -> None:
    connection = world.dial()
    world.accepted(connection)
    called: list[int] = []

    connection.close()
    connection.close(FrameError("again"))
    connection.send(header(1), [b"late"], on_sent=lambda: called.append(1))
    world.until(lambda: bool(world.listening.ends))
    world.reactor.poll(0.01)

    assert world.dialling.ends == [None]
    assert world.listening.ends == [None]
    assert called == []
    assert not connection.is_open


@pytest.mark.parametrize("answer", [False, True], ids=["idle", "in mid-frame"])
def test_what_a_vanished_peer_shared_stays_readable(world: World, answer: bool) -> None:
    """It is gone with its memory; what was mapped of it is not."""
    connection = world.dial()
    other = world.accepted(connection)
    world.give(connection, header(1), [b"gradient"])
    world.show(other, 1, b"values")
    world.until(lambda: bool(world.listening.frames and world.dialling.frames))
    shared = world.dialling.shared.get(connection)
    if answer:
        other.pause_reading()
        for step in range(8):
            connection.send(header(step), [bytes(MIB)])
    other.close()
    world.until(lambda: bool(world.dialling.ends))
    world.reactor.poll(0.01)

    assert len(world.dialling.ends) == len(world.listening.ends) == 1
    assert world.listening.shared == world.dialling.shared == {}
    assert (shared is not None) is (world.transport == "shm")
    if shared is not None:
        assert bytes(shared.window.view[8:14]) == b"values"
        assert shared.put_in_lane(b"more") is not None, "nobody will read it, and nothing breaks"


PEER = """
import os, socket, sys
from pscluster.wire.frame import FrameKind, Header, pack
from pscluster.wire.memory import Segment
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
caller, _ = listener.accept()
segment = Segment.create(1 << 20, writable_by_others=False)
segment.view[:6] = b"values"
header = pack(Header(kind=FrameKind.VALUES, job=1, step=1))
socket.send_fds(caller, [header], [segment.fd])
caller.sendall(pack(Header(kind=FrameKind.VALUES, job=1, step=2, length=100)) + b"half")
os.kill(os.getpid(), 9)
"""


def test_a_peer_that_is_killed_in_mid_frame_leaves_its_memory_to_who_mapped_it(tmp_path: Path) -> None:
    world = World.create("unix", tmp_path)
    world.dialling.takes = True
    peer = subprocess.Popen([sys.executable, "-c", PEER, f"{tmp_path}/p"], stdout=subprocess.PIPE)
    assert peer.stdout is not None and peer.stdout.readline() == b"ready\n"
    world.dial(f"unix:{tmp_path}/p")
    world.until(lambda: bool(world.dialling.ends))
    assert peer.wait(DEADLINE_S) == -9
    peer.stdout.close()

    assert world.dialling.steps == [1]
    assert world.dialling.ends == [None]
    segment = Segment.open(world.dialling.fds.pop(), 1 << 20, writable=False)
    assert bytes(segment.view[:6]) == b"values" and not any(segment.view[6:])
    world.reactor.close()


@pytest.mark.parametrize(
    "sent", [b"PS", pack(header())[:63], pack(Header(kind=FrameKind.PUSH, job=1, length=9)) + b"123"]
)
def test_a_peer_that_vanishes_in_mid_frame_ends_the_connection_alone(world: World, sent: bytes) -> None:
    bystander = world.dial()
    peer = world.raw()
    peer.sendall(sent)
    world.reactor.poll(0.01)
    peer.close()
    world.until(lambda: bool(world.listening.ends))

    assert world.listening.frames == []
    bystander.send(header(1))
    world.until(lambda: len(world.listening.frames) == 1)
    assert world.listening.ends == [None]


def test_a_reset_while_sending_is_reported_once_by_name(world: World) -> None:
    connection = world.dial()
    other = world.accepted(connection)
    other.pause_reading()
    for step in range(4):
        connection.send(header(step), [bytes(4 * MIB)])
    other.close()
    world.until(lambda: bool(world.dialling.ends))
    world.reactor.poll(0.01)

    assert len(world.dialling.ends) == 1
    assert isinstance(world.dialling.ends[0], FrameError | None)


def test_a_break_that_a_send_finds_is_reported_before_it_returns(world: World) -> None:
    """Whoever sends several frames has heard of it before the next one; `PlayedConnection` does the same."""
    connection = world.dial()
    world.accepted(connection).close()
    deadline_s = time.monotonic() + DEADLINE_S
    while connection.is_open:
        assert time.monotonic() < deadline_s
        connection.send(header(1), [bytes(MIB)])  # the reactor, which would hear it otherwise, has no turn

    assert [type(end) for end in world.dialling.ends] == [FrameError]


def test_a_handler_may_close_its_connection_in_mid_read(world: World) -> None:
    world.listening.on_frame = lambda connection, _: connection.close()
    connection = world.dial()
    for step in range(3):
        connection.send(header(step), [b"x"])
    world.until(lambda: bool(world.listening.ends))

    assert len(world.listening.frames) == 1


FORGED = Header(kind=FrameKind.PUSH, job=1, length=4, checksum=checksum([b"good"]))


def _with_protocol(number: int) -> bytes:
    fields = bytearray(pack(FORGED)[:-4])
    fields[4:6] = number.to_bytes(2, "little")
    return bytes(fields) + checksum([fields]).to_bytes(4, "little")


def _with_kind(number: int) -> bytes:
    fields = bytearray(pack(FORGED)[:-4])
    fields[6] = number
    return bytes(fields) + checksum([fields]).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("data", "error", "what"),
    [
        (b"GET / HTTP/1.1\r\n" + bytes(64), FrameError, "magic"),
        (_with_protocol(PROTOCOL + 1), VersionSkewError, "protocol"),
        (pack(FORGED)[:20] + b"\xff" + pack(FORGED)[21:], FrameError, "header"),
        (_with_kind(200), FrameError, "kind"),
        (pack(Header(kind=FrameKind.PUSH, job=1, length=2**63)), FrameError, "length"),
        (pack(Header(kind=FrameKind.FENCED, job=1, length=2**40)), FrameError, "length"),
        (pack(Header(kind=FrameKind.FENCED, job=1, length=8)), FrameError, "length"),
        (pack(FORGED) + b"evil", FrameError, "checksum"),
    ],
    ids=["magic", "protocol", "header", "kind", "huge", "huge at once", "other length", "body"],
)
@pytest.mark.parametrize("side", ["who listens", "who dialled"])
def test_what_breaks_the_protocol_is_cut_off_by_name(
    world: World, side: str, data: bytes, error: type[PsError], what: str
) -> None:
    peer, hears = (world.raw(), world.listening) if side == "who listens" else (world.raw_listener()[1], world.dialling)
    with peer:
        peer.sendall(data)
        world.until(lambda: bool(hears.ends))
        with contextlib.suppress(ConnectionError):  # what was not read of its bytes may reset it
            assert peer.recv(1) == b""

    assert len(hears.ends) == 1
    end = hears.ends[0]
    assert type(end) is error
    assert end.details["field"] == what
    assert hears.frames == []
    assert hears.given_bytes == (4 if what == "checksum" else 0)
