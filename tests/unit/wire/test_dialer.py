"""A connection that is dialed again: what it sends first, what it lets through, and whom it follows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import pscluster.wire.dialer
from harness.played import Network, PlayedConnection, job_header
from pscluster.errors import AuthError, FrameError, PsError
from pscluster.wire.dialer import ReconnectingConnection
from pscluster.wire.frame import MAX_SMALL_BYTES, FrameKind, Header
from pscluster.wire.protocol import Hello

HELLO = Hello(token="t", role="partition", channel="vote", attempt=1, restore_generation=1)


class Listening:
    """The other side: welcomes who says HELLO, if it `accepts`."""

    def __init__(self) -> None:
        self.accepts = True
        self.callers: list[PlayedConnection] = []

    def body_target(self, connection: PlayedConnection, header: Header) -> memoryview:  # noqa: ARG002
        return memoryview(bytearray(header.length))

    def frame(self, connection: PlayedConnection, header: Header, body: memoryview) -> None:
        assert header.kind is FrameKind.HELLO and Hello.unpack(body) == HELLO
        self.callers.append(connection)
        if self.accepts:
            connection.send(job_header(FrameKind.WELCOME))
        else:
            connection.close()

    def closed(self, connection: PlayedConnection, error: object) -> None: ...


class Dialing:
    """Keeps what is received."""

    def __init__(self, network: Network) -> None:
        self.welcomes = 0
        self.frames: list[tuple[Header, bytes]] = []
        self.losses: list[PsError | None] = []
        self.fails = False
        self.line = ReconnectingConnection(
            network,  # type: ignore[arg-type]
            self,
            lambda _: (job_header(FrameKind.HELLO), HELLO),
            channel="vote",
            kinds=frozenset({FrameKind.DECISION}),
            transport="auto",
            retry_s=(0.05, 1.0),
        )

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - Receiver's signature
        if self.fails:
            raise FrameError("this one does not fit")
        assert self.line.connection is not None
        self.welcomes += 1

    def frame(self, header: Header, body: memoryview) -> None:
        self.frames.append((header, bytes(body)))

    def lost(self, error: PsError | None) -> None:
        assert self.line.connection is None
        self.losses.append(error)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def there(network: Network) -> Listening:
    network.listeners["a"] = Listening()
    return network.listeners["a"]


@pytest.fixture
def here(network: Network) -> Iterator[Dialing]:
    made = Dialing(network)
    yield made
    made.line.close()


def test_frames_pass_once_the_other_side_welcomes(network: Network, there: Listening, here: Dialing) -> None:
    here.line.follow(["tcp:a"])
    network.settle()
    there.callers[0].send(job_header(FrameKind.DECISION), [b"x"])
    network.settle()

    assert here.welcomes == 1 and here.line.dialed == "tcp:a"
    assert [(header.kind, body) for header, body in here.frames] == [(FrameKind.DECISION, b"x")]


@pytest.mark.parametrize("body", [b"", b"x"])
def test_other_kinds_end_the_connection(body: bytes, network: Network, there: Listening, here: Dialing) -> None:
    here.line.follow(["tcp:a"])
    network.settle()
    there.callers[0].send(job_header(FrameKind.DIRECTIVE), [body])
    network.settle(redial=False)

    assert [error.code for error in here.losses if error is not None] == ["PS-3002"]
    assert here.frames == [] and here.line.connection is None


def test_a_body_that_is_not_small_is_refused_before_memory_is_given(here: Dialing) -> None:
    header = job_header(FrameKind.DECISION, length=MAX_SMALL_BYTES + 1)
    with pytest.raises(FrameError):
        here.line.body_target(object(), header)  # type: ignore[arg-type]


def test_what_breaks_is_dialed_again(network: Network, there: Listening, here: Dialing) -> None:
    here.line.follow(["tcp:a"])
    network.settle()
    there.callers[0].close()
    assert here.losses == [None] and here.line.connection is None
    network.settle()

    assert here.welcomes == 2 and here.line.connection is not None


def test_a_welcome_that_does_not_fit_is_a_loss(network: Network, there: Listening, here: Dialing) -> None:
    here.fails = True
    here.line.follow(["tcp:a"])
    network.settle(redial=False)
    assert len(here.losses) == len(there.callers) == 1
    here.fails = False
    network.settle()

    assert here.welcomes == 1


def test_who_follows_other_addresses_reads_nothing_more_from_the_old_ones(
    network: Network, there: Listening, here: Dialing
) -> None:
    network.listeners["b"] = other = Listening()
    here.line.follow(["tcp:a"])
    network.settle()
    there.callers[0].send(job_header(FrameKind.DECISION), [b"old"])
    here.line.follow(["tcp:b"])
    network.settle()

    assert here.line.addresses == ["tcp:b"] and len(other.callers) == 1
    assert here.frames == [] and here.losses == [], "it was no loss: nobody wanted it any more"
    assert not there.callers[0].is_open


def test_a_dial_that_was_given_up_is_not_used(network: Network, there: Listening, here: Dialing) -> None:
    here.line.follow(["tcp:a"])
    here.line.close()
    network.settle()

    assert here.welcomes == 0 and network.connections == [] and there.callers == []


def test_nobody_is_dialed_after_the_end(network: Network, there: Listening, here: Dialing) -> None:
    there.accepts = False
    here.line.follow(["tcp:a"])
    network.settle(redial=False)
    here.line.close()
    dials = len(there.callers)
    network.settle()

    assert len(there.callers) == dials == 1


def test_it_is_known_for_how_long_nothing_took_a_connection(network: Network, there: Listening, here: Dialing) -> None:
    far_s = time.monotonic() + 7
    assert here.line.unreached_s(far_s) == 0, "nothing is wanted"
    listening, network.listeners = network.listeners, {}
    here.line.follow(["tcp:a"])
    network.settle()
    assert here.line.unreached_s(far_s) > 0
    network.listeners = listening
    network.settle()
    assert here.welcomes == 1 and here.line.unreached_s(far_s) == 0
    there.callers[0].close()
    assert here.line.unreached_s(far_s) > 0


def test_a_connection_that_ends_because_of_its_certificate_was_not_taken(
    network: Network, there: Listening, here: Dialing
) -> None:
    here.line.follow(["tcp:a"])
    since_s = here.line._unreached_since_s
    for _ in range(3):
        network.posted.popleft()()
        assert here.line._pending is not None
        here.line._pending.close(AuthError("refused"))
        network.fire_timers()

    assert since_s is not None and here.line._unreached_since_s == since_s
    assert here.line.failure is not None and here.line.failure.code == "PS-1005" and there.callers == []


def test_waits_grow_from_failure_to_failure_and_begin_anew_after_a_welcome(
    network: Network, there: Listening, here: Dialing, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    later = network.call_later

    def call_later(delay_s: float, call: Any) -> None:
        waits.append(delay_s)
        later(delay_s, call)

    monkeypatch.setattr(network, "call_later", call_later)
    monkeypatch.setattr(pscluster.wire.dialer.random, "random", lambda: 0.999999)
    there.accepts = False
    here.line.follow(["tcp:a"])
    for _ in range(12):
        network.settle()
    there.accepts = True
    network.settle()
    there.callers[-1].close()

    assert here.welcomes == 1
    assert waits[:3] == pytest.approx([0.05, 0.075, 0.1125], rel=1e-3)
    assert max(waits) == pytest.approx(1.0, rel=1e-3) and waits[-1] == pytest.approx(0.05, rel=1e-3)
