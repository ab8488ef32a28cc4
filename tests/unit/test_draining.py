"""Waiting until a node is drained, on a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from harness.clock import Clock
from pscluster.client.goals import MAX_OUTAGE_S, wait_drained
from pscluster.client.records import Node
from pscluster.errors import StateError, UnreachableError, WaitTimeoutError

NODE = Node(
    node_id="worker-0", role="worker", ready=True, incarnation="i", cpu_cores=1, memory_bytes=1, devices=(), slots=1,
    last_beat_s=None, version="0", hostname="h", processes=("p",), metrics_address="", drain="draining",
    waits_for=("job: moves",),
)  # fmt: skip


def replies(*answers: list[Node] | Exception) -> Callable[[], list[Node]]:
    """These answers in turn, the last one for ever."""
    left = list(answers)

    def nodes() -> list[Node]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return nodes


def waiting(nodes: Callable[[], list[Node]], timeout_s: float | None = None, asked: Node = NODE) -> Iterator[Node]:
    clock = Clock()
    return wait_drained(nodes, asked, timeout_s, monotonic=clock.monotonic, sleep=clock.sleep)


def test_each_change_is_told_until_it_is_drained() -> None:
    moved = replace(NODE, waits_for=("job: rests",))
    empty = replace(NODE, drain="drained", waits_for=(), processes=())
    assert list(waiting(replies([NODE], [NODE], [moved], [empty]))) == [NODE, moved, empty]


def test_one_that_left_holds_nothing() -> None:
    assert [node.drain for node in waiting(replies([NODE], []))] == ["draining", "drained"]


def test_one_that_left_before_it_was_ever_listed_holds_nothing() -> None:
    shown, left = waiting(replies([]), 5.0)
    assert shown == NODE
    assert (left.drain, left.waits_for, left.processes, left.incarnation) == ("drained", (), (), "")


def test_one_that_was_drained_and_is_away_is_not_waited_for() -> None:
    away = replace(NODE, drain="drained", waits_for=(), processes=(), ready=False, incarnation="")
    assert list(waiting(replies([]), 5.0, away)) == [away]


def test_time_runs_out_with_what_it_waits_for() -> None:
    with pytest.raises(WaitTimeoutError, match=r"worker-0 .* 5 s: job: moves") as raised:
        list(waiting(replies([NODE]), 5.0))
    assert "psctl drain worker-0 --undo" in raised.value.action


def test_undone_meanwhile() -> None:
    with pytest.raises(StateError):
        list(waiting(replies([NODE], [replace(NODE, drain=None)])))


def test_a_master_that_is_away_is_waited_for() -> None:
    away = UnreachableError("nobody")
    empty = replace(NODE, drain="drained", waits_for=())
    assert [node.drain for node in waiting(replies([NODE], *[away] * 50, [empty]))] == ["draining", "drained"]
    with pytest.raises(UnreachableError):
        list(waiting(replies([NODE], away)))
    assert MAX_OUTAGE_S == 600
