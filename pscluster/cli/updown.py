"""Verbs of the local cluster: up, down."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from pscluster.cli.output import print_answer, print_info
from pscluster.cli.session import Session, Verb, pass_session
from pscluster.errors import PsError, SettingsError

if TYPE_CHECKING:
    from pscluster.cli.local.cluster import LocalCluster
    from pscluster.settings import LocatedCluster

_LOOK_S = 0.5
DEADLINE_S = 2.0
"""For each query about jobs: an informational line must not delay the command."""


@click.command("up", cls=Verb)
@click.option("--workers", type=click.IntRange(1, 64), default=None, help="worker nodes (2, or what runs already)")
@click.option("--servers", type=click.IntRange(1, 64), default=None, help="server nodes (1, or what runs already)")
@click.option("--foreground", is_flag=True, help="stay in the foreground; end the cluster on Ctrl-C or SIGTERM")
@pass_session
def up(session: Session, workers: int | None, servers: int | None, foreground: bool) -> None:
    """Start or complete a cluster on this machine.

    Returns when it is ready. Safe to repeat: it restarts what has ended, and with other counts it adds or removes
    nodes. Prints the master's address.
    """
    from pscluster.cli.local.cluster import interruptible_once

    cluster = _local(session)
    with interruptible_once():
        fresh = cluster.up(workers, servers)
        _register(cluster)
        if foreground:
            _stay(cluster, fresh)
        else:
            _print_summary(cluster, fresh)


@click.command("down", cls=Verb)
@pass_session
def down(session: Session) -> None:
    """Stop the local cluster. The state of its jobs is kept: unfinished ones continue after the next `psctl up`."""
    cluster = _local(session)
    if not _end(cluster):
        print_info(f"no cluster runs with state directory {cluster.state_dir}")


def _end(cluster: LocalCluster) -> bool:
    """Stop the cluster, and print that and its unfinished jobs; returns whether one ran."""
    left = unfinished_jobs(cluster.located)
    ran = cluster.down()
    if ran:
        for line in ("the cluster is down", *left):
            print_info(line)
    return ran


def _local(session: Session) -> LocalCluster:
    from pscluster.cli.local.cluster import LocalCluster

    located = session.located()
    if not located.local:
        raise SettingsError(f"{located.address} is not a local cluster", action=session.address_undo_hint())
    return LocalCluster(located=located, print_info=print_info)


def _register(cluster: LocalCluster) -> None:
    """Make it the context `local`. The cluster is up in any case: an unwritable settings file is only printed."""
    from pscluster.client.contexts import register_local

    try:
        register_local(cluster.state_dir, os.environ)
    except PsError as error:
        print_info(f"it is not written down as a context: {error.cause}")


def _print_summary(cluster: LocalCluster, fresh: bool) -> None:
    from pscluster.cli.local.processes import count_of

    names = [daemon.name for daemon in cluster.running]
    workers, servers = count_of(names, "worker"), count_of(names, "server")
    print_info(
        f"the cluster {'is up' if fresh else 'was up already'}: {workers} worker{'s' * (workers != 1)}, "
        f"{servers} server{'s' * (servers != 1)}, state in {cluster.state_dir}"
    )
    for line in continued_jobs(cluster.located, cluster.all_started) if cluster.master_started else ():
        print_info(line)
    if fresh:
        print_info("  psctl submit SPEC --follow   train something (psctl init DIR writes an example)")
        print_info("  psctl down                   stop it")
    print_answer(cluster.located.address)


def _stay(cluster: LocalCluster, fresh: bool) -> None:
    """Block until a signal or the end of a daemon; then stop everything."""
    never = threading.Event()
    try:
        _print_summary(cluster, fresh)
        print_info("running in the foreground; Ctrl-C stops the cluster")
        while not never.wait(_LOOK_S):
            cluster.check()
    except KeyboardInterrupt:
        print_info("stopping the cluster")
    finally:
        _end(cluster)


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


COMMANDS = (up, down)
