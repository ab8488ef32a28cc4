"""Verbs that wait for a job or change its fate, or a node's: wait, stop, resume, delete, drain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pscluster.cli.formatting import parse_duration
from pscluster.cli.session import Session, Verb, answer, pass_session, say
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
    """Wait until JOB has succeeded, runs, or has reached a step.

    Exits 100 when it failed instead, 103 when it was stopped, 101 when time ran out.
    """
    from pscluster.client import parse_goal

    parsed = parse_goal(goal)
    with session.connect() as cluster:
        found = cluster.wait(job, parsed, timeout)
    answer(found.job_id)


@click.command("stop", cls=Verb)
@click.argument("job")
@click.option("--no-wait", is_flag=True, help="return once the request is stored")
@duration_option("--timeout", "120s", "how long to wait")
@pass_session
def stop(session: Session, job: str, no_wait: bool, timeout: float) -> None:
    """Stop JOB at its next step boundary, with a snapshot, and wait for it. `psctl resume` goes on from there."""
    with session.connect() as cluster:
        found = cluster.stop(job)
        if not no_wait:
            found = cluster.wait(found.job_id, "ended", timeout)
    say(f"{found.job_id} is {found.state} at step {found.step}" if found.ended else f"{found.job_id} will stop")
    answer(found.job_id)


@click.command("resume", cls=Verb)
@click.argument("job")
@click.option("--follow", is_flag=True, help="follow it as `psctl submit --follow` does")
@pass_session
def resume(session: Session, job: str, follow: bool) -> None:
    """Continue a stopped or failed JOB from its newest complete snapshot."""
    with session.connect() as cluster:
        found = cluster.resume(job)
        answer(found.job_id)
        if follow:
            from pscluster.cli.following import follow_to_end

            follow_to_end(cluster, found.job_id, session.located())
    if not follow:
        say(f"{found.job_id} is {found.state}; follow it with: psctl follow {found.job_id}")


@click.command("delete", cls=Verb)
@click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
@pass_session
def delete(session: Session, jobs: tuple[str, ...]) -> None:
    """Forget ended jobs and remove their snapshots, logs and metrics. Refused while one runs."""
    with session.connect() as cluster:
        for job in jobs:
            answer(cluster.delete(job))


@click.command("drain", cls=Verb)
@click.argument("node")
@click.option("--undo", is_flag=True, help="let the node be given processes again")
@click.option("--no-wait", is_flag=True, help="return once the request is stored")
@duration_option("--timeout", None, "give up waiting after this long (90s, 5m), with exit code 101; it drains on")
@pass_session
def drain(session: Session, node: str, undo: bool, no_wait: bool, timeout: float | None) -> None:
    """Move everything away from NODE, place nothing there any more, and wait until it is empty.

    Shards go to other workers first; partitions move with a snapshot, from which their job goes on. A job that cannot
    live without the node goes on there, and is named. The node stays drained, over restarts, until --undo.
    """
    with session.connect() as cluster:
        if undo:
            say(_undone(cluster, node))
        elif no_wait:
            cluster.drain(node)
            say(f"{node} drains; see `psctl nodes`")
        else:
            _empty(cluster, node, timeout)
            say(f"{node} is drained; to use it again: psctl drain {node} --undo")
    answer(node)


def _undone(cluster: Cluster, node: str) -> str:
    """End a drain; what that changed, in words."""
    listed = {found.node_id: found for found in cluster.nodes()}
    after = cluster.undrain(node)
    # The master knows a node that it does not list by its drain alone.
    if node in listed and listed[node].drain is None:
        return f"{node} was not drained"
    return f"{node} takes processes again" + ("" if after.incarnation else ", once it is back")


def _empty(cluster: Cluster, node: str, timeout_s: float | None) -> None:
    """Drain a node and block until it is empty, saying what is waited for whenever that changes."""
    told: tuple[str, ...] = ()
    for found in cluster.drained(cluster.drain(node), timeout_s):
        for line in found.waits_for:
            if line not in told:
                say(f"waits: {line}")
        told = found.waits_for
        if not found.incarnation:
            say(f"{node} is not in the cluster now, and holds nothing of any job")


COMMANDS = (wait, stop, resume, delete, drain)
