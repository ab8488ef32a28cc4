"""Verbs that wait for a job, or control a job or node: wait, stop, resume, delete, drain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pscluster.cli.formatting import parse_duration
from pscluster.cli.output import print_answer, print_info
from pscluster.cli.session import Session, Verb, pass_session
from pscluster.errors import SettingsError

if TYPE_CHECKING:
    from pscluster.client import Cluster

F = TypeVar("F", bound=Callable[..., Any])


def duration_option(flag: str, default: str | None, text: str) -> Callable[[F], F]:
    """An option that takes "90", "90s", "5m", "1h30m" and gives seconds; usage error for anything else."""

    def convert(_ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
        if value is None:
            return None
        try:
            return parse_duration(value)
        except SettingsError as error:
            raise click.BadParameter(f"{error.cause}; {error.action}", param=param) from None

    return click.option(
        flag, default=default, callback=convert, metavar="DURATION", show_default=default is not None, help=text
    )


@click.command("wait", cls=Verb)
@click.argument("job")
@click.option(
    "--for",
    "goal",
    default="succeeded",
    metavar="GOAL",
    help="succeeded (default), running, step=N, stopped, failed or ended",
)
@duration_option("--timeout", None, "give up after this long (90s, 5m), with exit code 101")
@pass_session
def wait(session: Session, job: str, goal: str, timeout: float | None) -> None:
    """Wait until JOB has succeeded or reached --for.

    Exits 100 when it failed instead, 103 when it was stopped, 101 after --timeout.
    """
    from pscluster.client import parse_goal

    parsed = parse_goal(goal)
    with session.connect() as cluster:
        found = cluster.wait(job, parsed, timeout)
    print_answer(found.job_id)


@click.command("stop", cls=Verb)
@click.argument("job")
@click.option("--no-wait", is_flag=True, help="return once the request is stored")
@duration_option("--timeout", "120s", "how long to wait")
@pass_session
def stop(session: Session, job: str, no_wait: bool, timeout: float) -> None:
    """Stop JOB at its next step boundary, and wait for that.

    It writes a snapshot, from which `psctl resume` continues.
    """
    with session.connect() as cluster:
        found = cluster.stop(job)
        if not no_wait:
            found = cluster.wait(found.job_id, "ended", timeout)
    print_info(f"{found.job_id} is {found.state} at step {found.step}" if found.ended else f"{found.job_id} will stop")
    print_answer(found.job_id)


@click.command("resume", cls=Verb)
@click.argument("job")
@click.option("--follow", is_flag=True, help="follow it as `psctl submit --follow` does")
@pass_session
def resume(session: Session, job: str, follow: bool) -> None:
    """Continue a stopped or failed JOB. It starts from its newest complete snapshot."""
    with session.connect() as cluster:
        found = cluster.resume(job)
        print_answer(found.job_id)
        if follow:
            from pscluster.cli.following import follow_to_end

            follow_to_end(cluster, found.job_id, session.located())
    if not follow:
        print_info(f"{found.job_id} is {found.state}; follow it with: psctl follow {found.job_id}")


@click.command("delete", cls=Verb)
@click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
@pass_session
def delete(session: Session, jobs: tuple[str, ...]) -> None:
    """Delete ended jobs and all their files.

    Removes their snapshots, logs and metrics. Refused while a job runs.
    """
    with session.connect() as cluster:
        for job in jobs:
            print_answer(cluster.delete(job))


@click.command("drain", cls=Verb)
@click.argument("node")
@click.option("--undo", is_flag=True, help="end the drain: the node gets processes again")
@click.option("--no-wait", is_flag=True, help="return once the request is stored")
@duration_option(
    "--timeout", None, "give up waiting after this long (90s, 5m), with exit code 101; the drain continues"
)
@pass_session
def drain(session: Session, node: str, undo: bool, no_wait: bool, timeout: float | None) -> None:
    """Move all processes off NODE, and wait until it is empty.

    No new ones are placed there. Shards move to other workers first; partitions move with a snapshot, from which their
    job continues. A job that cannot run without the node stays there, and is printed. The node stays drained, across
    restarts, until --undo.
    """
    with session.connect() as cluster:
        if undo:
            print_info(_undone(cluster, node))
        elif no_wait:
            cluster.drain(node)
            print_info(f"{node} is draining; see `psctl nodes`")
        else:
            _empty(cluster, node, timeout)
            print_info(f"{node} is drained; to use it again: psctl drain {node} --undo")
    print_answer(node)


def _undone(cluster: Cluster, node: str) -> str:
    """End a drain; returns what that changed."""
    listed = {found.node_id: found for found in cluster.nodes()}
    after = cluster.undrain(node)
    # A node that the master does not list is known only by its drain.
    if node in listed and listed[node].drain is None:
        return f"{node} was not drained"
    return f"{node} accepts processes again" + ("" if after.incarnation else ", once it is connected")


def _empty(cluster: Cluster, node: str, timeout_s: float | None) -> None:
    """Drain a node and block until it is empty, printing what is waited for whenever that changes."""
    shown: tuple[str, ...] = ()
    for found in cluster.drained(cluster.drain(node), timeout_s):
        for line in found.waits_for:
            if line not in shown:
                print_info(f"waiting: {line}")
        shown = found.waits_for
        if not found.incarnation:
            print_info(f"{node} is not connected, and no job has a process there")


COMMANDS = (wait, stop, resume, delete, drain)
