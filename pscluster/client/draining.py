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
    node_id: str,
    timeout_s: float | None = None,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Node]:
    """The node whenever what it tells has changed, until it is drained; the last one is.

    A master that is away is waited for, up to ten minutes. Raises WaitTimeoutError, StateError, PsError of `nodes`."""
    deadline = math.inf if timeout_s is None else monotonic() + timeout_s
    shown: Node | None = None
    last_heard = monotonic()
    while True:
        try:
            found = next((node for node in nodes() if node.node_id == node_id), None)
            last_heard = monotonic()
        except UnreachableError:
            if monotonic() - last_heard >= PATIENCE_S or monotonic() >= deadline:
                raise
            found = shown
        if found is None and shown is not None:
            found = replace(shown, drain=DRAINED, waits_for=(), processes=())  # it has left
        if found is not None and _told(found) != _told(shown):
            shown = found
            yield found
        if shown is not None and shown.drain is None:
            raise StateError(f"node {node_id} is not being drained any more", action="somebody has undone it")
        if shown is not None and shown.drain == DRAINED:
            return
        if monotonic() >= deadline:
            why = "; ".join(shown.waits_for) if shown is not None else ""
            raise WaitTimeoutError(f"{node_id} is not drained within {timeout_s:g} s" + (f": {why}" if why else ""))
        sleep(POLL_S)


def _told(node: Node | None) -> tuple[object, ...]:
    return () if node is None else (node.drain, node.waits_for, node.processes)
