"""Waiting until a node is drained. The time is an argument, so that tests need not wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pscluster.client.records import Node
from pscluster.errors import StateError, UnreachableError, WaitTimeoutError

DRAINED = "drained"
POLL_S = 0.25
PATIENCE_S = 600.0


def wait_drained(
    nodes: Callable[[], Sequence[Node]],
    asked: Node,
    timeout_s: float | None = None,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Node]:
    """`asked`, which the master returned when it was asked for the drain, and then the node whenever what it tells has
    changed, until it is drained; the last one is.

    The master lists every node on which a job has a placement: one that it does not list holds nothing. A master that
    is away is waited for, up to ten minutes. Raises WaitTimeoutError, StateError, PsError of `nodes`."""
    deadline = math.inf if timeout_s is None else monotonic() + timeout_s
    shown = asked
    last_heard = monotonic()
    yield shown
    while shown.drain != DRAINED:
        if shown.drain is None:
            raise StateError(f"node {shown.node_id} is not being drained any more", action="somebody has undone it")
        if monotonic() >= deadline:
            why = "; ".join(shown.waits_for)
            raise WaitTimeoutError(
                f"{shown.node_id} is not drained within {timeout_s:g} s" + (f": {why}" if why else ""),
                action=f"it still drains; `psctl drain {shown.node_id} --undo` ends that",
            )
        sleep(POLL_S)
        try:
            found = next((node for node in nodes() if node.node_id == shown.node_id), None) or _left(shown)
            last_heard = monotonic()
        except UnreachableError:
            if monotonic() - last_heard >= PATIENCE_S or monotonic() >= deadline:
                raise
            continue
        if _told(found) != _told(shown):
            shown = found
            yield shown


def _left(node: Node) -> Node:
    """The node once it is not listed any more, as the master itself tells of a drained one that is away."""
    return replace(node, drain=DRAINED, waits_for=(), processes=(), ready=False, incarnation="")


def _told(node: Node) -> tuple[object, ...]:
    return node.drain, node.waits_for, node.processes
