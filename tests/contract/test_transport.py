"""What every transport promises of the frames it carries: one suite over Unix sockets, TCP and shared memory."""

from __future__ import annotations

import os

import pytest

from harness.wire import MIB, NUM_LANES, World, header
from pscluster.errors import FrameError
from pscluster.wire.connection import Connection
from pscluster.wire.frame import FrameKind, Header, checksum, pack

# ---- what is sent arrives ----


def test_a_frame_arrives_as_it_was_sent_gathered_from_its_parts(world: World) -> None:
    connection = world.dial()

    connection.send(header(5), [b"ab", bytearray(b""), memoryview(b"xcdx")[1:3]])
    world.until(lambda: len(world.listening.frames) == 1)

    got, body = world.listening.frames[0]
    assert (got.kind, got.step, got.length, body) == (FrameKind.PUSH, 5, 4, b"abcd")
    assert got.checksum == checksum([b"abcd"])


def test_a_frame_without_a_body_arrives(world: World) -> None:
    world.dial().send(header(1, kind=FrameKind.PULL))
    world.until(lambda: len(world.listening.frames) == 1)

    assert world.listening.frames[0][1] == b""
    assert world.listening.given_bytes == 0


def test_a_checksum_that_the_sender_knows_is_taken_at_its_word_and_checked_where_it_arrives(world: World) -> None:
    connection = world.dial()
    connection.send(header(1), [b"ab", b"cd"], body_checksum=checksum([b"abcd"]))
    world.until(lambda: len(world.listening.frames) == 1)
    connection.send(header(2), [b"abcd"], body_checksum=checksum([b"abce"]))
    world.until(lambda: bool(world.listening.ends))

    assert world.listening.frames[0][1] == b"abcd" and len(world.listening.frames) == 1
    end = world.listening.ends[0]
    assert isinstance(end, FrameError) and end.details["field"] == "checksum"


def queued_bytes(connection: Connection) -> int:
    """Bytes handed to `send` and not yet taken by the kernel."""
    return sum(view.nbytes for item in connection._outgoing for view in item.views)


def test_big_frames_are_written_and_read_in_parts(world: World) -> None:
    connection = world.dial()
    body = os.urandom(1 << 16) * 320  # 20 MiB: more than any socket buffer, and than one turn of reading
    sent: list[int] = []

    connection.send(header(1), [body[: 7 * MIB], body[7 * MIB :]], on_sent=lambda: sent.append(1))
    assert sent == []  # the kernel cannot have taken it all
    assert 0 < queued_bytes(connection) < len(body) + 64
    connection.send(header(2), [b"after"], on_sent=lambda: sent.append(2))
    world.until(lambda: len(world.listening.frames) == 2)

    assert world.listening.frames[0][1] == body
    assert world.listening.frames[1][1] == b"after"
    assert sent == [1, 2]
    assert queued_bytes(connection) == 0
    assert not connection.wants_write


@pytest.mark.parametrize("at", [0, 1 * MIB + 17, 3 * MIB + 4])
def test_one_wrong_bit_anywhere_in_a_big_body_is_found(world: World, at: int) -> None:
    """The checksum is taken piece by piece while the body comes: no piece may be left out."""
    body = os.urandom(1 << 16) * 48 + b"tail!"
    wrong = bytearray(body)
    wrong[at] ^= 0x10
    connection = world.dial()
    connection.send(header(1), [body])
    connection.send(header(2), [wrong], body_checksum=checksum([body]))
    world.until(lambda: bool(world.listening.ends))

    assert [head.step for head, _ in world.listening.frames] == [1]
    end = world.listening.ends[0]
    assert isinstance(end, FrameError) and end.details["field"] == "checksum"


def test_big_answers_are_written_and_read_in_parts(world: World) -> None:
    """The other way round, in turns with small ones."""
    connection = world.accepted(world.dial())
    body = os.urandom(1 << 16) * 100
    for step in range(6):
        connection.send(header(step, kind=FrameKind.VALUES), [body if step % 2 else b"small"])
    world.until(lambda: len(world.dialling.frames) == 6)

    assert world.dialling.steps == list(range(6))
    assert all(got == (body if head.step % 2 else b"small") for head, got in world.dialling.frames)


def test_gradients_go_and_values_come_by_the_transports_own_way(world: World) -> None:
    connection = world.dial()
    other = world.accepted(connection)
    bodies = [os.urandom(size) for size in (1, 5000, MIB)]
    for step, body in enumerate(bodies):
        assert world.give(connection, header(step), [body[:1], body[1:]]) is (world.transport == "shm")
        world.until(lambda: len(world.listening.frames) == step + 1)  # noqa: B023 - called at once
        world.show(other, step, body)
        world.until(lambda: len(world.dialling.frames) == step + 1)  # noqa: B023

    assert [body for _, body in world.listening.frames] == bodies
    assert [body for _, body in world.dialling.frames] == bodies
    through_sockets = sum(map(len, bodies)) * (world.transport != "shm")
    assert world.listening.given_bytes == world.dialling.given_bytes == through_sockets


def test_two_connections_to_one_peer_each_keep_their_order(world: World) -> None:
    """By whatever way each frame goes, and one of them stopping: nothing is promised across the two."""
    one, two = world.dial(), world.dial()
    sides = {connection: world.accepted(connection) for connection in (one, two)}
    sides[one].pause_reading()
    bodies = [bytes([step % 251]) * (step * 997 % 50_000) for step in range(60)]
    for step, body in enumerate(bodies):
        connection = (one, two)[step % 2]
        if step % 3:
            world.give(connection, header(step), [body])
        else:
            connection.send(header(step), [body])
    world.until(lambda: len(world.listening.frames) == 30)
    assert world.listening.steps == list(range(1, 60, 2))
    sides[one].resume_reading()
    world.until(lambda: len(world.listening.frames) == 60)

    assert world.listening.steps[30:] == list(range(0, 60, 2))
    assert all(body == bodies[head.step] for head, body in world.listening.frames)


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
    packed = pack(Header(kind=FrameKind.PUSH, job=1, step=3, length=5, checksum=checksum([b"hello"]))) + b"hello"
    with peer:
        for byte in packed:
            peer.sendall(bytes([byte]))
            world.reactor.poll(0)
        world.until(lambda: len(world.listening.frames) == 1)

    assert world.listening.frames[0][1] == b"hello"


def test_bytes_one_by_one_make_a_frame_for_who_dialled(world: World) -> None:
    """Who dials looks for descriptors beside each byte of a header."""
    _, peer = world.raw_listener()
    packed = pack(Header(kind=FrameKind.VALUES, job=1, step=3, length=5, checksum=checksum([b"hello"]))) + b"hello"
    with peer:
        for byte in packed * 2:
            peer.sendall(bytes([byte]))
            world.reactor.poll(0)
        world.until(lambda: len(world.dialling.frames) == 2)

    assert [body for _, body in world.dialling.frames] == [b"hello"] * 2


@pytest.mark.parametrize("piece", [4097, 100_000, (512 << 10) - 1, 512 << 10, MIB + 70])
@pytest.mark.parametrize("side", ["who listens", "who dialled"])
def test_a_frame_is_there_with_its_last_byte_however_its_bytes_come(world: World, side: str, piece: int) -> None:
    """Nothing that the kernel was asked to wait for holds up the end of a body, nor a small frame behind a big one."""
    peer, hears = (world.raw(), world.listening) if side == "who listens" else (world.raw_listener()[1], world.dialling)
    sizes = [0, 5, 600_000, 0, 1_200_000, 3, 512 << 10, 1]
    waiting = b""
    with peer:
        for step, size in enumerate(sizes):
            body = bytes([step + 1]) * size
            head = Header(
                kind=FrameKind.VALUES, job=1, step=step, length=size, checksum=checksum([body]) if body else 0
            )
            waiting += pack(head) + body
            while len(waiting) >= piece:
                world.feed(peer, waiting[:piece])
                waiting = waiting[piece:]
                world.reactor.poll(0)
            if step % 2:  # the rest of this frame comes alone, that of the other one with the next
                world.feed(peer, waiting)
                waiting = b""
                world.until(lambda: len(hears.frames) == step + 1)  # noqa: B023 - called at once

    assert [len(body) for _, body in hears.frames] == sizes


def test_connections_do_not_wait_for_each_other(world: World) -> None:
    """One peer stops in mid-frame; another's frames are served meanwhile."""
    slow, quick = world.raw(), world.dial()
    with slow:
        packed = pack(Header(kind=FrameKind.PUSH, job=1, step=1, length=3, checksum=checksum([b"abc"])))
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
    waiting = queued_bytes(connection)
    assert 0 < waiting <= 8 * (MIB + 64)

    world.reactor.poll(0.05)
    assert queued_bytes(connection) <= waiting
    other.resume_reading()
    world.until(lambda: len(world.listening.frames) == 8)

    assert queued_bytes(connection) == 0


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


def test_a_peer_that_stops_reading_holds_up_nobody_and_gets_everything_later(world: World) -> None:
    """What waits is what was given; where memory is shared its places run out, and the rest waits like any other."""
    connection, bystander = world.dial(), world.dial()
    other, further = world.accepted(connection), world.accepted(bystander)
    assert further is not other
    other.pause_reading()
    bodies = [bytes([step]) * MIB for step in range(12)]
    lanes = [world.give(connection, header(step), [body]) for step, body in enumerate(bodies)]
    assert lanes == ([True] * NUM_LANES + [False] * (12 - NUM_LANES) if world.transport == "shm" else [False] * 12)
    waiting = queued_bytes(connection)
    assert 0 < waiting <= sum(map(len, bodies)) + 12 * 64
    world.give(bystander, header(77), [b"x"])
    world.until(lambda: world.listening.steps == [77])
    assert queued_bytes(connection) <= waiting

    other.resume_reading()
    world.until(lambda: len(world.listening.frames) == 13)
    assert [body for head, body in world.listening.frames if head.step != 77] == bodies
    assert queued_bytes(connection) == 0
    if world.transport == "shm":
        assert not any(world.dialling.shared[connection].lanes._taken), "every place was given back"
