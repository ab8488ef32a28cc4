"""Verbs of the local cluster: up, down."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import click

from pscluster.cli.local.interruptions import interruptible_once
from pscluster.cli.session import Session, Verb, answer, pass_session, say
from pscluster.errors import SettingsError

if TYPE_CHECKING:
    from pscluster.cli.local.cluster import LocalCluster

_LOOK_S = 0.5


@click.command("up", cls=Verb)
@click.option("--workers", type=click.IntRange(1, 64), default=None, help="worker nodes (2, or what runs already)")
@click.option("--servers", type=click.IntRange(1, 64), default=None, help="server nodes (1, or what runs already)")
@click.option("--foreground", is_flag=True, help="stay, and take the cluster down on Ctrl-C or SIGTERM")
@pass_session
def up(session: Session, workers: int | None, servers: int | None, foreground: bool) -> None:
    """Start a cluster on this machine, or complete the one that runs; return when it is ready.

    Repeating it is harmless: it starts what has ended, and with other counts it adds or removes nodes. Prints the
    master's address.
    """
    cluster = _local(session)
    with interruptible_once():
        fresh = cluster.up(workers, servers)
        if foreground:
            _stay(cluster, fresh)
        else:
            _tell(cluster, fresh)


@click.command("down", cls=Verb)
@pass_session
def down(session: Session) -> None:
    """End the local cluster. Its jobs' state stays: after the next `psctl up` unfinished ones go on."""
    cluster = _local(session)
    if not _end(cluster):
        say(f"no cluster runs with state directory {cluster.state_dir}")


def _end(cluster: LocalCluster) -> bool:
    """Take the cluster down and say so, and which jobs that leaves unfinished; whether there was one."""
    from pscluster.cli.local.master_queries import left_by_down

    left = left_by_down(cluster.located)
    ran = cluster.down()
    if ran:
        for line in ("the cluster is down", *left):
            say(line)
    return ran


def _local(session: Session) -> LocalCluster:
    from pscluster.cli.local.cluster import LocalCluster

    located = session.located()
    if not located.local:
        raise SettingsError(f"{located.address} is not a local cluster", action=session.address_given())
    return LocalCluster(located=located, say=say)


def _tell(cluster: LocalCluster, fresh: bool) -> None:
    from pscluster.cli.local.master_queries import taken_up
    from pscluster.cli.local.processes import count_of

    names = [daemon.name for daemon in cluster.running]
    workers, servers = count_of(names, "worker"), count_of(names, "server")
    say(
        f"the cluster {'is up' if fresh else 'was up already'}: {workers} worker{'s' * (workers != 1)}, "
        f"{servers} server{'s' * (servers != 1)}, state in {cluster.state_dir}"
    )
    for line in taken_up(cluster.located, cluster.all_started) if cluster.master_started else ():
        say(line)
    if fresh:
        say("  psctl submit SPEC --follow   train something (psctl init DIR writes an example)")
        say("  psctl down                   end it")
    answer(cluster.located.address)


def _stay(cluster: LocalCluster, fresh: bool) -> None:
    """Block until a signal asks for the end, or a daemon ends by itself; then take everything down."""
    quiet = threading.Event()
    try:
        _tell(cluster, fresh)
        say("running in the foreground; Ctrl-C ends it")
        while not quiet.wait(_LOOK_S):
            cluster.check()
    except KeyboardInterrupt:
        say("ending the cluster")
    finally:
        _end(cluster)


COMMANDS = (up, down)
