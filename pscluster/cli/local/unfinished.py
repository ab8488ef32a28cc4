"""The jobs that a local cluster has not finished: what `up` and `down` say of them."""

from __future__ import annotations

from contextlib import suppress

from pscluster.errors import PsError
from pscluster.settings import LocatedCluster

DEADLINE_S = 2.0
"""For each question: nobody is kept waiting for a remark."""


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
