"""The loop under every transport: callers, timers, calls from other threads, descriptors that run out."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pscluster.wire.reactor
from harness.wire import DEADLINE_S, Recorder, World, header
from pscluster.errors import AddressInUseError, PsError, UnreachableError
from pscluster.wire.connection import Connection
from pscluster.wire.frame import pack
from pscluster.wire.reactor import Reactor


def test_nobody_listening_is_an_answer(world: World) -> None:
    kind = world.address.partition(":")[0]
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = "unix:/nowhere/s" if kind == "unix" else f"tcp:127.0.0.1:{free.getsockname()[1]}"
    answers: list[tuple[Connection | None, PsError | None]] = []
    world.reactor.dial(nowhere, world.dialling, lambda *answer: answers.append(answer))
    world.until(lambda: bool(answers))

    connection, why = answers[0]
    assert connection is None and isinstance(why, UnreachableError)
    assert why.details["address"] == nowhere and why.details["reason"] == ("other" if kind == "unix" else "refused")
    assert world.dialling.ends == []


def test_a_dial_that_gets_no_answer_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pscluster.wire.reactor, "DIAL_S", 0.1)
    reactor, answers = Reactor(), []
    with contextlib.ExitStack() as stack:
        stack.callback(reactor.close)
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        waiting = [stack.enter_context(socket.socket()) for _ in range(4)]  # more than it lets wait to be accepted
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        reactor.dial(f"tcp:127.0.0.1:{full.getsockname()[1]}", Recorder(), lambda *answer: answers.append(answer))
        deadline_s = time.monotonic() + DEADLINE_S
        while not answers and time.monotonic() < deadline_s:
            reactor.poll(0.05)
        assert [(made, why.details["reason"]) for made, why in answers if why is not None] == [(None, "timed out")]


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
    world = World.create("unix", tmp_path, handshake_s=0.05)
    listening = world.listening
    listening.on_frame = lambda connection, _: setattr(connection, "context", "greeted")
    silent = world.dial()
    polite = world.dial()
    polite.send(header())
    world.until(lambda: not silent.is_open)
    assert [end.code for end in listening.ends] == ["PS-3002"]
    polite.send(header(1))
    world.until(lambda: len(listening.frames) == 2)
    world.reactor.close()


def test_moving_bytes_is_told_apart_from_everything_else() -> None:
    """What a handler does counts as receiving; what a caller sends at once is the caller's."""
    running: list[str] = []
    seen: list[tuple[str, list[str]]] = []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        running.append(name)
        seen.append(("enter", list(running)))
        yield
        running.pop()

    reactor, recorder = Reactor(phase), Recorder()
    ours, theirs = socket.socketpair()
    sending, _ = reactor.adopt(ours, Recorder()), reactor.adopt(theirs, recorder)
    recorder.on_frame = lambda *_: seen.append(("frame", list(running)))
    sending.send(header(1), [bytes(4 << 20)])
    assert seen == []
    while not recorder.frames:
        reactor.poll(0.05)
    reactor.close()

    assert ("frame", ["receive"]) in seen
    assert {tuple(phases) for _, phases in seen} == {("receive",), ("send",)}
