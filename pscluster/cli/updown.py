"""Verbs of the local cluster: up, down."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import click

from pscluster.cli.local.interruptions import interruptible_once
from pscluster.cli.session import Session, Verb, pass_session, print_answer, print_info
from pscluster.errors import SettingsError

if TYPE_CHECKING:
    from pscluster.cli.local.cluster import LocalCluster

_LOOK_S = 0.5


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
    cluster = _local(session)
    with interruptible_once():
        fresh = cluster.up(workers, servers)
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
    from pscluster.cli.local.master_queries import unfinished_jobs

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


def _print_summary(cluster: LocalCluster, fresh: bool) -> None:
    from pscluster.cli.local.master_queries import continued_jobs
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


COMMANDS = (up, down)
