"""Follows a job until it ends: a progress bar on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import click

from pscluster.cli.narrator import Narrator, ProgressRate, ending_line, progress_line, progress_parts
from pscluster.cli.session import INTERRUPTED, print_info, stderr_is_terminal

if TYPE_CHECKING:
    from rich.console import Console

    from pscluster.client import Cluster, Job
    from pscluster.errors import UnreachableError
    from pscluster.settings import LocatedCluster

MAX_OUTAGE_S = 600.0
"""How long to wait for an unreachable master."""

_BAR_WIDTH = 28
_NARROWEST = 4  # a narrower bar shows nothing


class View(Protocol):
    """Where the progress of a job is shown."""

    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def print_line(self, line: str) -> None:
        """Print a permanent line."""

    def update(self, job: Job) -> None:
        """Show the job's current state."""

    def note(self, text: str, since: str = "") -> None:
        """Show a temporary note, or none. `since`: how long it has applied; a change of it alone is no new note."""


class PlainView:
    """Lines: changes at once, progress at most every two seconds."""

    def __init__(self) -> None:
        self._rate = ProgressRate()
        self._note = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def print_line(self, line: str) -> None:
        print_info(line)

    def update(self, job: Job) -> None:
        if job.step and not job.ended and self._rate.allows(job.step, time.monotonic()):
            print_info(progress_line(job))

    def note(self, text: str, since: str = "") -> None:  # noqa: ARG002 - on a permanent line it would become outdated
        if text and text != self._note:
            print_info(text)
        self._note = text


class BarView:
    """A bar in place, with changes printed above it. In a narrow terminal first the bar shrinks, then the text beside
    it; the name stays complete."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(max_width=_BAR_WIDTH)),
            TextColumn("{task.fields[line]}"),
            console=console or Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self._task: Any = self.progress.add_task("", total=None, line="")
        self._shown = ""

    def __enter__(self) -> BarView:
        self.progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.progress.stop()

    def print_line(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False)

    def update(self, job: Job) -> None:
        columns = self.progress.console.width - len(job.name) - _NARROWEST - 2
        self._shown = bar_text(job, columns)
        self.progress.update(
            self._task, description=job.name, total=job.final_step, completed=job.step, line=_literal(self._shown)
        )

    def note(self, text: str, since: str = "") -> None:
        self.progress.update(self._task, line=_literal((text and f"{text} ({since})") or self._shown))


def bar_text(job: Job, columns: int) -> str:
    """The text beside the bar, if possible in at most `columns` characters: progress while the job runs, before that
    only the state. The reason is printed above, and would leave no space for the bar."""
    if job.state != "RUNNING" or not job.step:
        return job.state
    parts = progress_parts(job)
    while len(parts) > 1 and len("  ".join(parts)) > columns:
        del parts[min(2, len(parts) - 1)]  # the speed first, the step never
    return "  ".join(parts)


def _literal(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def follow(cluster: Cluster, job_id: str, view: View, located: LocatedCluster) -> Job:
    """Show a job until it has ended; returns its last state. Blocks; an unreachable master is waited for."""
    from pscluster.client import ReconnectingStream

    def on_outage(_error: UnreachableError, seconds: float) -> None:
        view.note(outage_note(located, MAX_OUTAGE_S), f"{seconds:.0f} s")

    narrator = Narrator()
    job: Job | None = None
    with view:
        stream = ReconnectingStream(max_outage_s=MAX_OUTAGE_S, on_outage=on_outage, on_reconnect=lambda: view.note(""))
        for job in cluster.watch(job_id, stream):
            for line in narrator.news(job, time.time()):
                view.print_line(line)
            view.update(job)
    if job is None:
        raise RuntimeError("a watch ended without a job")
    return job


def outage_note(located: LocatedCluster, patience_s: float) -> str:
    """A note about a master that does not answer. `psctl down` ends the job's processes, too, and removes the record of
    them; otherwise, or on another machine, it is unknown here whether the job continues."""
    from pscluster.cli.local.record import record_path

    waits = f"waiting up to {patience_s / 60:.0f} min"
    if located.local and not record_path(located.state_dir).exists():
        return f"the cluster was taken down; {waits} for the next psctl up, Ctrl-C detaches"
    return f"the master does not answer; {waits} for it, Ctrl-C detaches"


def follow_to_end(cluster: Cluster, job_id: str, located: LocatedCluster, *, tied: bool = False) -> None:
    """Follow a job until it ends: returns when it succeeded, else raises JobFailedError or JobStoppedError.

    Ctrl-C detaches: prints that and exits 130; the job continues. A job that is `tied` to the caller is left to it, and
    nothing is printed.
    """
    from pscluster.client import end_error

    view: View = BarView() if stderr_is_terminal() else PlainView()
    try:
        job = follow(cluster, job_id, view, located)
    except KeyboardInterrupt:
        if not tied:
            print_info(f"detached; {job_id} continues")
            print_info(f"  psctl follow {job_id}   attach again")
            print_info(f"  psctl stop {job_id}     stop it")
        raise click.exceptions.Exit(INTERRUPTED) from None
    print_info(ending_line(job))
    error = end_error(job)
    if error is not None:
        raise error
    if stderr_is_terminal():
        print_info(f"  psctl export {job_id} -o model.safetensors   write its parameters to a file")
