"""The process's end of the line to its agent, over a real socket pair."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.agent.link import MAX_FRAME_BYTES, FrameSplitter, ProcessLink, encode_frame
from pscluster.errors import FrameError, SettingsError, UnreachableError
from pscluster.v1.plan_pb2 import Beat, Plan, ProcessOrder, ProcessReport, ProcessSpec, Shutdown

Pair = tuple[socket.socket, socket.socket]


def order(**body: object) -> bytes:
    return encode_frame(ProcessOrder(**body).SerializeToString())  # type: ignore[arg-type]


START = order(start=ProcessSpec(process_id="j/trainer-0/1"))


@pytest.fixture
def pair() -> Iterator[Pair]:
    agent, child = socket.socketpair()
    yield agent, child
    agent.close()
    child.close()


def test_reads_the_start_order_then_others_in_order(pair: Pair) -> None:
    agent, child = pair
    agent.sendall(START + order(plan=Plan(generation=1)) + order(plan=Plan(generation=2)))
    link = ProcessLink(child)
    assert link.start.process_id == "j/trainer-0/1"
    first = link.receive()
    assert first is not None
    assert first.plan.generation == 1
    assert [o.plan.generation for o in link.receive_nowait()] == [2]
    assert link.receive_nowait() == []


def test_an_order_may_arrive_in_pieces(pair: Pair) -> None:
    agent, child = pair
    agent.sendall(START)
    link = ProcessLink(child)
    data = order(shutdown=Shutdown())
    for index in range(len(data) - 1):
        agent.sendall(data[index : index + 1])
        assert link.receive_nowait() == []
    agent.sendall(data[-1:])
    assert link.receive_nowait()[0].HasField("shutdown")


def test_the_agents_end_is_seen_after_its_last_order(pair: Pair) -> None:
    agent, child = pair
    agent.sendall(START + order(plan=Plan(generation=1)))
    agent.close()
    link = ProcessLink(child)
    assert len(link.receive_nowait()) == 1
    with pytest.raises(EOFError):
        link.receive_nowait()
    assert link.receive() is None
    with pytest.raises(EOFError):
        link.report(ProcessReport(beat=Beat()))


def test_no_start_order_is_an_error(pair: Pair) -> None:
    agent, child = pair
    with pytest.raises(UnreachableError, match="start order"):
        ProcessLink(child, deadline_s=0.01)
    agent.close()
    with pytest.raises(UnreachableError, match="ended"):
        ProcessLink(child)


@pytest.mark.parametrize("data", [order(shutdown=Shutdown()), b"\xff\xff\xff\xff", encode_frame(b"\xff\xff")])
def test_anything_but_a_start_order_first_is_refused(pair: Pair, data: bytes) -> None:
    agent, child = pair
    agent.sendall(data)
    with pytest.raises(FrameError):
        ProcessLink(child)


def test_reports_of_many_threads_arrive_whole(pair: Pair) -> None:
    agent, child = pair
    agent.sendall(START)
    link = ProcessLink(child)

    def speak(base: int) -> None:
        for number in range(200):
            link.report(ProcessReport(beat=Beat(progress=base + number)))

    threads = [threading.Thread(target=speak, args=(1000 * (1 + n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    splitter = FrameSplitter()
    received: list[int] = []
    while len(received) < 800:
        received += [ProcessReport.FromString(m).beat.progress for m in splitter.feed(agent.recv(100))]
    for thread in threads:
        thread.join()
    for base in (1000, 2000, 3000, 4000):
        assert [number for number in received if base <= number < base + 1000] == [base + n for n in range(200)]


def test_adopts_the_socket_named_by_the_environment(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, child = pair
    agent.sendall(START)
    number = os.dup(child.fileno())
    os.set_inheritable(number, True)
    monkeypatch.setenv("PS_CONTROL_FD", str(number))
    link = ProcessLink.from_environment()
    assert link.fileno() == number
    assert not os.get_inheritable(number)
    assert "PS_CONTROL_FD" not in os.environ
    link.close()


def test_a_process_started_by_hand_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PS_CONTROL_FD", raising=False)
    with pytest.raises(SettingsError, match="PS_CONTROL_FD"):
        ProcessLink.from_environment()


@given(st.lists(st.binary(max_size=50), max_size=10), st.lists(st.integers(0, 600), max_size=10))
def test_frames_survive_any_cut(messages: list[bytes], cuts: list[int]) -> None:
    data = b"".join(encode_frame(message) for message in messages)
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    splitter = FrameSplitter()
    got = [m for a, b in itertools.pairwise(edges) for m in splitter.feed(data[a:b])]
    assert got == messages


def test_a_message_too_long_is_not_sent() -> None:
    with pytest.raises(FrameError):
        encode_frame(bytes(MAX_FRAME_BYTES + 1))
