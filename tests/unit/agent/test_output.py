"""Output is cut into lines, bounded, and nothing goes missing uncounted."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pscluster.agent.report_queue import Backlog, LineSplitter
from pscluster.v1.agents_pb2 import LogLine


def cut(*pieces: bytes, max_bytes: int = 16) -> list[str]:
    cutter = LineSplitter(max_bytes)
    return [line for piece in pieces for line in cutter.feed(piece)] + cutter.flush()


def test_lines_survive_any_cut() -> None:
    assert cut(b"one\ntw", b"o\n", b"\nrest") == ["one", "two", "", "rest"]


def test_a_long_line_is_cut_and_the_next_is_whole() -> None:
    assert cut(b"x" * 10, b"x" * 10 + b"\nshort\n") == ["x" * 16, "short"]


def test_only_the_last_state_of_an_overwritten_line_counts() -> None:
    assert cut(b"10%\r20%\r", b"30%\r", b"40%\n") == ["40%"]
    assert cut(b"10%\r20%\r\nnext\r\n") == ["20%", "next"]


def test_what_is_not_text_is_replaced() -> None:
    assert cut(b"a\xffb\n") == ["a\ufffdb"]


@given(st.text("ab\n", max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_where_the_stream_is_cut_does_not_matter(text: str, cuts: list[int]) -> None:
    data = text.encode()
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    lines = text.split("\n")
    expected = lines if lines[-1] else lines[:-1]
    assert cut(*pieces, max_bytes=100) == expected


def line(number: int) -> LogLine:
    return LogLine(text=str(number), stream="stdout")


def test_the_oldest_lines_give_way_and_are_counted() -> None:
    backlog = Backlog(max_lines=3)
    assert [backlog.add(line(number)) for number in range(5)] == [0, 0, 0, 1, 1]
    batch = backlog.take("p")
    assert [kept.text for kept in batch.lines] == ["2", "3", "4"]
    assert batch.dropped == 2
    assert not backlog
    assert backlog.take("p").dropped == 0


def test_bytes_are_bounded_too() -> None:
    backlog = Backlog(max_bytes=1000)
    for number in range(100):
        backlog.add(LogLine(text=f"{number:03d}" + "x" * 97))
    batch = backlog.take("p")
    assert 0 < len(batch.lines) < 10
    assert batch.dropped == 100 - len(batch.lines)


def test_a_batch_is_bounded_and_holds_at_least_one_line() -> None:
    backlog = Backlog()
    for number in range(10):
        backlog.add(line(number))
    assert [kept.text for kept in backlog.take("p", max_bytes=1).lines] == ["0"]
    assert [kept.text for kept in backlog.take("p", max_bytes=150).lines] == ["1", "2"]
    assert backlog
