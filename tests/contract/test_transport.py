"""What every transport promises: one suite over Unix sockets and TCP."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pscluster.errors import AddressInUseError, FrameError, PsError, VersionSkewError
from pscluster.wire.connection import Connection
from pscluster.wire.frame import PROTOCOL, Header, Kind, checksum, pack
from pscluster.wire.reactor import Reactor

DEADLINE_S = 20.0
MIB = 1 << 20


def _ignore(_connection: Connection, _header: Header) -> None:
    """A frame is kept, and that is all."""


@dataclass
class Recorder:
    """A handler that keeps what it gets. `limit_bytes`: bodies beyond it are refused before memory is given."""

    limit_bytes: int = 64 * MIB
    frames: list[tuple[Header, bytes]] = field(default_factory=list)
    ends: list[PsError | None] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    given_bytes: int = 0
    on_frame: Callable[[Connection, Header], None] = _ignore

    def body_target(self, connection: Connection, header: Header) -> memoryview:  # noqa: ARG002 - Handler's
        if header.length > self.limit_bytes:
            raise FrameError(f"{header.length} bytes", details={"field": "length"})
        if header.kind is Kind.FENCED:
            return memoryview(bytearray(1))  # not what the header says
        self.given_bytes += header.length
        return memoryview(bytearray(header.length))

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        if connection not in self.connections:
            self.connections.append(connection)
        self.frames.append((header, bytes(body)))
        self.on_frame(connection, header)

    def closed(self, connection: Connection, error: PsError | None) -> None:  # noqa: ARG002 - Handler's
        self.ends.append(error)


def header(step: int = 0, *, kind: Kind = Kind.PUSH) -> Header:
    return Header(kind=kind, job=1, step=step)


@dataclass
class World:
    """A listening and a dialling side on one reactor, driven by the test."""

    reactor: Reactor
    address: str
    listening: Recorder
    dialling: Recorder

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "nothing more happens"
            self.reactor.poll(0.05)

    def dial(self) -> Connection:
        answers: list[tuple[Connection | None, str]] = []
        self.reactor.dial(self.address, self.dialling, lambda *answer: answers.append(answer))
        self.until(lambda: bool(answers))
        connection, why = answers[0]
        assert connection is not None, why
        return connection

    def accepted(self, connection: Connection) -> Connection:
        """The other end, found by a first frame."""
        known = len(self.listening.connections)
        connection.send(header(99))
        self.until(lambda: len(self.listening.connections) > known)
        self.listening.frames.clear()
        return self.listening.connections[-1]

    def raw(self) -> socket.socket:
        """A blocking socket to the listener, for peers that break the protocol."""
        kind, _, rest = self.address.partition(":")
        sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
        sock.settimeout(DEADLINE_S)
        sock.connect(rest if kind == "unix" else ("127.0.0.1", int(rest.rpartition(":")[2])))
        return sock


@pytest.fixture(params=["unix", "tcp"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    reactor, listening = Reactor(), Recorder()
    address = reactor.listen(f"unix:{tmp_path}/s" if request.param == "unix" else "tcp:127.0.0.1:0", listening)
    yield World(reactor, address, listening, Recorder())
    with contextlib.suppress(OSError):  # one test closes it by itself
        reactor.close()


# ---- what is sent arrives ----


def test_a_frame_arrives_as_it_was_sent_gathered_from_its_parts(world: World) -> None:
    connection = world.dial()

    connection.send(header(5), [b"ab", bytearray(b""), memoryview(b"xcdx")[1:3]])
    world.until(lambda: len(world.listening.frames) == 1)

    got, body = world.listening.frames[0]
    assert (got.kind, got.step, got.length, body) == (Kind.PUSH, 5, 4, b"abcd")
    assert got.checksum == checksum([b"abcd"])


def test_a_frame_without_a_body_arrives(world: World) -> None:
    world.dial().send(header(1, kind=Kind.PULL))
    world.until(lambda: len(world.listening.frames) == 1)

    assert world.listening.frames[0][1] == b""
    assert world.listening.given_bytes == 0


def test_big_frames_are_written_and_read_in_parts(world: World) -> None:
    connection = world.dial()
    body = os.urandom(1 << 16) * 320  # 20 MiB: more than any socket buffer, and than one turn of reading
    sent: list[int] = []

    connection.send(header(1), [body[: 7 * MIB], body[7 * MIB :]], on_sent=lambda: sent.append(1))
    assert sent == []  # the kernel cannot have taken it all
    assert 0 < connection.queued_bytes < len(body) + 64
    connection.send(header(2), [b"after"], on_sent=lambda: sent.append(2))
    world.until(lambda: len(world.listening.frames) == 2)

    assert world.listening.frames[0][1] == body
    assert world.listening.frames[1][1] == b"after"
    assert sent == [1, 2]
    assert connection.queued_bytes == 0
    assert not connection.wants_write


def test_more_parts_than_one_call_takes_arrive_in_order(world: World) -> None:
    parts = [bytes([i % 251]) * (i % 5) for i in range(3000)]

    world.dial().send(header(), parts)
    world.until(lambda: len(world.listening.frames) == 1)

    assert world.listening.frames[0][1] == b"".join(parts)


def test_many_small_frames_keep_their_order(world: World) -> None:
    connection = world.dial()
    for step in range(5000):
        connection.send(header(step), [step.to_bytes(4, "little")])
    world.until(lambda: len(world.listening.frames) == 5000)

    assert [h.step for h, _ in world.listening.frames] == list(range(5000))
    assert all(int.from_bytes(body, "little") == h.step for h, body in world.listening.frames)


def test_bytes_one_by_one_make_a_frame(world: World) -> None:
    peer = world.raw()
    packed = pack(Header(kind=Kind.PUSH, job=1, step=3, length=5, checksum=checksum([b"hello"]))) + b"hello"
    with peer:
        for byte in packed:
            peer.sendall(bytes([byte]))
            world.reactor.poll(0)
        world.until(lambda: len(world.listening.frames) == 1)

    assert world.listening.frames[0][1] == b"hello"


def test_connections_do_not_wait_for_each_other(world: World) -> None:
    """One peer stops in mid-frame; another's frames are served meanwhile."""
    slow, quick = world.raw(), world.dial()
    with slow:
        packed = pack(Header(kind=Kind.PUSH, job=1, step=1, length=3, checksum=checksum([b"abc"])))
        slow.sendall(packed + b"a")
        for step in (2, 3):
            quick.send(header(step), [b"x"])
        world.until(lambda: len(world.listening.frames) == 2)
        slow.sendall(b"bc")
        world.until(lambda: len(world.listening.frames) == 3)

    assert [h.step for h, _ in world.listening.frames] == [2, 3, 1]


def test_answers_come_back_on_the_same_connection(world: World) -> None:
    world.listening.on_frame = lambda connection, h: connection.send(header(h.step + 1), [b"pong"])

    world.dial().send(header(1), [b"ping"])
    world.until(lambda: len(world.dialling.frames) == 1)

    assert world.dialling.frames[0][0].step == 2


# ---- peers that do not read ----


def test_what_waits_for_a_peer_that_does_not_read_is_what_was_sent(world: World) -> None:
    connection, body = world.dial(), bytes(MIB)
    other = world.accepted(connection)
    other.pause_reading()
    for step in range(8):
        connection.send(header(step), [body])
    world.reactor.poll(0)
    assert world.listening.frames == []
    waiting = connection.queued_bytes
    assert 0 < waiting <= 8 * (MIB + 64)

    world.reactor.poll(0.05)
    assert connection.queued_bytes <= waiting
    other.resume_reading()
    world.until(lambda: len(world.listening.frames) == 8)

    assert connection.queued_bytes == 0


def test_detached_memory_may_be_overwritten(world: World) -> None:
    connection, memory = world.dial(), bytearray(b"a" * 8 * MIB)
    other = world.accepted(connection)
    other.pause_reading()
    connection.send(header(1), [memory], tag=("values", 1))
    connection.send(header(2), [memory], tag=("values", 2))
    assert connection.wants_write

    connection.detach(("values", 1))
    connection.detach(("values", 2))
    memory[:] = b"b" * len(memory)
    other.resume_reading()
    world.until(lambda: len(world.listening.frames) == 2)

    assert {body for _, body in world.listening.frames} == {b"a" * 8 * MIB}


def test_detach_leaves_other_frames_memory_alone(world: World) -> None:
    """What is not detached is still read from the caller's memory, and its checksum tells."""
    connection, memory = world.dial(), bytearray(b"a" * 8 * MIB)
    other = world.accepted(connection)
    other.pause_reading()
    connection.send(header(1), [memory], tag=None)
    connection.detach(None)
    memory[-1:] = b"b"
    other.resume_reading()
    world.until(lambda: bool(world.listening.ends))

    assert isinstance(world.listening.ends[0], FrameError)
    assert world.listening.frames == []


def test_pausing_inside_a_frame_stops_the_next_one(world: World) -> None:
    world.listening.on_frame = lambda connection, h: connection.pause_reading() if h.step == 1 else None
    connection = world.dial()
    for step in (1, 2):
        connection.send(header(step), [b"x"])
    world.until(lambda: len(world.listening.frames) == 1)
    world.reactor.poll(0.05)
    assert len(world.listening.frames) == 1

    world.listening.connections[0].resume_reading()
    world.until(lambda: len(world.listening.frames) == 2)


def test_on_sent_may_send_the_next_frame(world: World) -> None:
    connection = world.dial()
    steps = iter(range(1, 2000))

    def send_next() -> None:
        step = next(steps, None)
        if step is not None:
            world.reactor.post(lambda: connection.send(header(step), [b"x"], on_sent=send_next))

    connection.send(header(0), [b"x"], on_sent=send_next)
    world.until(lambda: len(world.listening.frames) == 2000)

    assert [h.step for h, _ in world.listening.frames] == list(range(2000))


# ---- ends ----


def test_closing_is_told_once_to_both_sides_and_nothing_is_sent_after(world: World) -> None:
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


@pytest.mark.parametrize("sent", [b"PS", pack(header())[:63], pack(Header(kind=Kind.PUSH, job=1, length=9)) + b"123"])
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


def test_a_reset_while_sending_is_told_once_by_name(world: World) -> None:
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


def test_a_handler_may_close_its_connection_in_mid_read(world: World) -> None:
    world.listening.on_frame = lambda connection, _: connection.close()
    connection = world.dial()
    for step in range(3):
        connection.send(header(step), [b"x"])
    world.until(lambda: bool(world.listening.ends))

    assert len(world.listening.frames) == 1


FORGED = Header(kind=Kind.PUSH, job=1, length=4, checksum=checksum([b"good"]))


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
        (pack(Header(kind=Kind.PUSH, job=1, length=2**63)), FrameError, "length"),
        (pack(Header(kind=Kind.FENCED, job=1, length=2**40)), FrameError, "length"),
        (pack(Header(kind=Kind.FENCED, job=1, length=8)), FrameError, "length"),
        (pack(FORGED) + b"evil", FrameError, "checksum"),
    ],
    ids=["magic", "protocol", "header", "kind", "huge", "huge at once", "other length", "body"],
)
def test_what_breaks_the_protocol_is_cut_off_by_name(
    world: World, data: bytes, error: type[PsError], what: str
) -> None:
    peer = world.raw()
    with peer:
        peer.sendall(data)
        world.until(lambda: bool(world.listening.ends))
        with contextlib.suppress(ConnectionError):  # what was not read of its bytes may reset it
            assert peer.recv(1) == b""

    assert len(world.listening.ends) == 1
    end = world.listening.ends[0]
    assert type(end) is error
    assert end.details["field"] == what
    assert world.listening.frames == []
    assert world.listening.given_bytes == (4 if what == "checksum" else 0)


# ---- the reactor ----


def test_nobody_listening_is_an_answer(world: World) -> None:
    kind = world.address.partition(":")[0]
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = "unix:/nowhere/s" if kind == "unix" else f"tcp:127.0.0.1:{free.getsockname()[1]}"
    answers: list[tuple[Connection | None, str]] = []
    world.reactor.dial(nowhere, world.dialling, lambda *answer: answers.append(answer))
    world.until(lambda: bool(answers))

    assert answers[0][0] is None
    assert answers[0][1]
    assert world.dialling.ends == []


def test_calls_from_other_threads_run_in_order_on_the_reactors_thread(world: World) -> None:
    ran: list[tuple[int, int]] = []
    threads = [
        threading.Thread(target=lambda n=n: [world.reactor.post(lambda i=i: ran.append((n, i))) for i in range(500)])  # type: ignore[misc]
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    world.until(lambda: len(ran) == 2000)
    for thread in threads:
        thread.join()

    for n in range(4):
        assert [i for who, i in ran if who == n] == list(range(500))


def test_a_post_wakes_a_reactor_that_waits_and_stop_ends_it(world: World) -> None:
    thread = threading.Thread(target=world.reactor.run)
    thread.start()
    world.reactor.post(world.reactor.stop)
    thread.join(DEADLINE_S)

    assert not thread.is_alive()


def test_timers_fire_in_order_and_once(world: World) -> None:
    fired: list[str] = []
    world.reactor.call_later(0.02, lambda: fired.append("later"))
    world.reactor.call_later(0.0, lambda: fired.append("first"))
    world.reactor.call_later(0.0, lambda: fired.append("second"))
    world.until(lambda: len(fired) == 3)
    world.reactor.poll(0.01)

    assert fired == ["first", "second", "later"]


def test_closing_ends_everything_and_removes_the_socket_file(world: World) -> None:
    connection = world.dial()
    world.accepted(connection)
    path = world.address.removeprefix("unix:")
    assert not world.address.startswith("unix:") or os.path.exists(path)

    world.reactor.close()

    assert world.dialling.ends == [None]
    assert world.listening.ends == [None]
    assert not os.path.exists(path)
    world.reactor.post(lambda: pytest.fail("nobody runs this"))  # from a thread that has not heard: harmless
    again = Reactor()
    try:
        assert again.listen(world.address, Recorder()) == world.address
        with pytest.raises(AddressInUseError):
            again.listen(world.address, Recorder())
    finally:
        again.close()


def test_callers_wait_while_no_descriptor_is_free_and_others_are_served(world: World) -> None:
    connection = world.dial()
    world.accepted(connection)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    peers = [world.raw() for _ in range(3)]  # not accepted yet: the reactor has not polled
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        world.reactor.poll(0.01)
        connection.send(header(7))
        world.until(lambda: any(h.step == 7 for h, _ in world.listening.frames))
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for peer in peers:
        peer.sendall(pack(header(8)))
    world.until(lambda: sum(h.step == 8 for h, _ in world.listening.frames) == 3)
    for peer in peers:
        peer.close()


def test_a_caller_that_does_not_greet_in_time_is_closed_by_name_and_one_that_did_stays(tmp_path: Path) -> None:
    reactor, listening = Reactor(), Recorder()
    listening.on_frame = lambda connection, _: setattr(connection, "context", "greeted")
    address = reactor.listen(f"unix:{tmp_path}/s", listening, greeting_s=0.05)
    world = World(reactor, address, listening, Recorder())
    silent = world.dial()
    polite = world.dial()
    polite.send(header())
    world.until(lambda: not silent.is_open)
    assert [str(end) for end in listening.ends] == ["PS-3002: a caller that did not greet"]
    polite.send(header(1))
    world.until(lambda: len(listening.frames) == 2)
    reactor.close()
