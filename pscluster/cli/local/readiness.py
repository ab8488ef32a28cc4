"""Waiting until the master answers and every node is ready."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pscluster.errors import UnhealthyError, UnreachableError
from pscluster.settings import LocatedCluster

if TYPE_CHECKING:
    from pscluster.client import Cluster

_POLL_S = 0.05
_TELL_AFTER_S = 3.0


def wait_ready(
    located: LocatedCluster,
    names: Sequence[str],
    check: Callable[[], None],
    say: Callable[[str], None],
    deadline_s: float,
) -> None:
    """Block until the master answers and exactly-named nodes are ready and no others are.

    `check` is called between looks and raises when a daemon has ended. Says after 3 seconds, and when it changes,
    what is waited for. Raises UnhealthyError after `deadline_s`.
    """
    started = time.monotonic()
    told = ""
    with contextlib.ExitStack() as stack:
        for missing in _looks(located, names, stack):
            if not missing:
                return
            check()
            elapsed = time.monotonic() - started
            waits = f"waiting for {', '.join(missing)}"
            if elapsed > deadline_s:
                raise UnhealthyError(f"not ready after {deadline_s:g} s: {waits}")
            if elapsed > _TELL_AFTER_S and waits != told:
                say(waits)
                told = waits
            time.sleep(_POLL_S)


def _looks(located: LocatedCluster, names: Sequence[str], stack: contextlib.ExitStack) -> Iterator[list[str]]:
    """What is missing, at each look; ["master"] while it does not answer."""
    from pscluster.client import Cluster

    cluster: Cluster | None = None
    while True:
        try:
            cluster = cluster or stack.enter_context(Cluster.connect_to(located))
            ready = {node.node_id for node in cluster.nodes() if node.ready}
            yield [name for name in names if name not in ready]
        except UnreachableError:
            yield ["master"]
