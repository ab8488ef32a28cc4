"""Queries to a local cluster's master: which nodes are ready, which jobs are unfinished."""

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
_PRINT_AFTER_S = 3.0
DEADLINE_S = 2.0
"""For each query about jobs: an informational line must not delay the command."""


def wait_ready(
    located: LocatedCluster,
    names: Sequence[str],
    check: Callable[[], None],
    print_info: Callable[[str], None],
    deadline_s: float,
) -> None:
    """Block until the master answers and all nodes in `names` are ready.

    `check` is called between polls and raises when a daemon has ended. Prints what is waited for after 3 seconds, and
    when it changes. Raises UnhealthyError after `deadline_s`.
    """
    started = time.monotonic()
    printed = ""
    with contextlib.ExitStack() as stack:
        for missing in _poll(located, names, stack):
            if not missing:
                return
            check()
            elapsed = time.monotonic() - started
            waits = f"waiting for {', '.join(missing)}"
            if elapsed > deadline_s:
                raise UnhealthyError(f"not ready after {deadline_s:g} s: {waits}")
            if elapsed > _PRINT_AFTER_S and waits != printed:
                print_info(waits)
                printed = waits
            time.sleep(_POLL_S)


def _poll(located: LocatedCluster, names: Sequence[str], stack: contextlib.ExitStack) -> Iterator[list[str]]:
    """What is missing, at each poll; ["master"] while it does not answer."""
    from pscluster.client import Cluster

    cluster: Cluster | None = None
    while True:
        try:
            cluster = cluster or stack.enter_context(Cluster.connect_to(located))
            ready = {node.node_id for node in cluster.nodes() if node.ready}
            yield [name for name in names if name not in ready]
        except UnreachableError:
            yield ["master"]


def unfinished_jobs(located: LocatedCluster) -> list[str]:
    """One line for each unfinished job, to be requested before the cluster is stopped and printed afterwards. No lines
    when the master does not answer: that must not keep the cluster from being stopped."""
    from pscluster.client import Cluster

    with suppress(PsError), Cluster.connect_to(located, deadline_s=DEADLINE_S) as cluster:
        return [
            f"{job.job_id} was {f'at step {job.step}' if job.step else job.state}; it continues after the next psctl up"
            for job in reversed(cluster.jobs(DEADLINE_S))
            if not job.ended
        ]
    return []


def continued_jobs(located: LocatedCluster, anew: bool) -> list[str]:
    """One line for each job that continues under a started master. `anew`: everything else was started, too, and each
    job begins at its newest snapshot. No lines when the master does not answer."""
    from pscluster.client import Cluster

    lines = []
    with suppress(PsError), Cluster.connect_to(located, deadline_s=DEADLINE_S) as cluster:
        for job in reversed(cluster.jobs(DEADLINE_S)):
            if not job.ended:
                steps = [snapshot.step for snapshot in cluster.snapshots(job.job_id)] if anew else []
                lines.append(f"continuing: {job.job_id}" + (f" (from step {steps[-1]})" if steps else ""))
    return lines
