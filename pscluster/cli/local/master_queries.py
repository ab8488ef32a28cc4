"""Waiting until the master answers and every node is ready."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pscluster.errors import PsError, UnhealthyError, UnreachableError
from pscluster.settings import LocatedCluster

if TYPE_CHECKING:
    from pscluster.client import Cluster


_POLL_S = 0.05
_TELL_AFTER_S = 3.0
DEADLINE_S = 2.0
"""For each question: nobody is kept waiting for a remark."""


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


def left_by_down(located: LocatedCluster) -> list[str]:
    """One line for each unfinished job, to be asked for before the cluster is ended and said afterwards. None when
    the master does not answer: that keeps no cluster from being ended."""
    from pscluster.client import Cluster

    with suppress(PsError), Cluster.connect_to(located, deadline_s=DEADLINE_S) as cluster:
        return [
            f"{job.job_id} was {f'at step {job.step}' if job.step else job.state}; it goes on after the next psctl up"
            for job in reversed(cluster.jobs(DEADLINE_S))
            if not job.ended
        ]
    return []


def taken_up(located: LocatedCluster, anew: bool) -> list[str]:
    """One line for each job that goes on under a master that was started. `anew`: so was everything else, and each
    begins at its newest snapshot. None when the master does not answer any more."""
    from pscluster.client import Cluster

    lines = []
    with suppress(PsError), Cluster.connect_to(located, deadline_s=DEADLINE_S) as cluster:
        for job in reversed(cluster.jobs(DEADLINE_S)):
            if not job.ended:
                steps = [snapshot.step for snapshot in cluster.snapshots(job.job_id)] if anew else []
                lines.append(f"goes on: {job.job_id}" + (f" (from step {steps[-1]})" if steps else ""))
    return lines
