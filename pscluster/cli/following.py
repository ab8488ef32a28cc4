"""Following a job to its end: a progress bar on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import click

from pscluster.cli.narrator import Narrator, ProgressRate, ending_line, progress_line, progress_parts
from pscluster.cli.session import INTERRUPTED, say, stderr_is_terminal

if TYPE_CHECKING:
    from rich.console import Console

    from pscluster.client import Cluster, Job
    from pscluster.errors import UnreachableError
    from pscluster.settings import LocatedCluster

MAX_OUTAGE_S = 600.0
"""For so long a master may be away."""

_BAR_WIDTH = 28
_NARROWEST = 4  # a bar below that says nothing


class View(Protocol):
    """Where following is shown."""

    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def say(self, line: str) -> None:
        """Print a line that stays."""

    def update(self, job: Job) -> None:
        """Show the job as it is now."""

    def note(self, text: str, since: str = "") -> None:
        """Show a passing remark, or none. `since`: for how long it has been true; another one makes no new remark."""


class PlainView:
    """Lines: news at once, progress every two seconds at most."""

    def __init__(self) -> None:
        self._pace = ProgressRate()
        self._note = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def say(self, line: str) -> None:
        say(line)

    def update(self, job: Job) -> None:
        if job.step and not job.ended and self._pace.lets(job.step, time.monotonic()):
            say(progress_line(job))

    def note(self, text: str, since: str = "") -> None:  # noqa: ARG002 - a line that stays would be out of date
        if text and text != self._note:
            say(text)
        self._note = text


class BarView:
    """A bar that stays in place, with the news above it. Where there is little room the bar is the first to shrink,
    then the text beside it says less; the name stays whole."""

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

    def say(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False)

    def update(self, job: Job) -> None:
        room = self.progress.console.width - len(job.name) - _NARROWEST - 2
        self._shown = bar_text(job, room)
        self.progress.update(
            self._task,
            description=job.name,
            total=job.final_step,
            completed=job.step,
            line=_literal(self._shown),
        )

    def note(self, text: str, since: str = "") -> None:
        self.progress.update(self._task, line=_literal((text and f"{text} ({since})") or self._shown))


def bar_text(job: Job, room: int) -> str:
    """What stands beside the bar, in at most `room` columns where that can be: progress while it runs; before that the
    state alone. The reason is told above, and would leave the bar no room."""
    if job.state != "RUNNING" or not job.step:
        return job.state
    parts = progress_parts(job)
    while len(parts) > 1 and len("  ".join(parts)) > room:
        del parts[min(2, len(parts) - 1)]  # the speed first, the step never
    return "  ".join(parts)


def _literal(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def follow(cluster: Cluster, job_id: str, view: View, located: LocatedCluster) -> Job:
    """Show a job until it has ended; returns it as it ended. Blocks; a master that is away is waited for."""
    from pscluster.client import ReconnectingStream

    def on_outage(_error: UnreachableError, seconds: float) -> None:
        view.note(outage(located, MAX_OUTAGE_S), f"{seconds:.0f} s")

    narrator = Narrator()
    job: Job | None = None
    with view:
        stream = ReconnectingStream(max_outage_s=MAX_OUTAGE_S, on_outage=on_outage, on_reconnect=lambda: view.note(""))
        for job in cluster.watch(job_id, stream):
            for line in narrator.news(job, time.time()):
                view.say(line)
            view.update(job)
    if job is None:
        raise RuntimeError("a watch ended without a job")
    return job


def outage(located: LocatedCluster, patience_s: float) -> str:
    """What is known of a master that does not answer. `psctl down` ends the job's processes too, and removes the record
    of them; without it, or elsewhere, nobody here knows whether the job goes on."""
    from pscluster.cli.local.record import record_path

    waits = f"waits up to {patience_s / 60:.0f} min"
    if located.local and not record_path(located.state_dir).exists():
        return f"the cluster was taken down; {waits} for the next psctl up, Ctrl-C detaches"
    return f"the master does not answer; {waits} for it, Ctrl-C detaches"


def follow_to_end(cluster: Cluster, job_id: str, located: LocatedCluster, *, tied: bool = False) -> None:
    """Follow a job and end as it does: returns when it succeeded, else raises JobFailedError or JobStoppedError.

    Ctrl-C detaches: says so and exits 130; the job goes on. One that is `tied` to the caller goes on or not as that
    one says, and psctl says nothing.
    """
    from pscluster.client import end_error

    view: View = BarView() if stderr_is_terminal() else PlainView()
    try:
        job = follow(cluster, job_id, view, located)
    except KeyboardInterrupt:
        if not tied:
            say(f"detached; {job_id} goes on")
            say(f"  psctl follow {job_id}   attach again")
            say(f"  psctl stop {job_id}     stop it")
        raise click.exceptions.Exit(INTERRUPTED) from None
    say(ending_line(job))
    error = end_error(job)
    if error is not None:
        raise error
    if stderr_is_terminal():
        say(f"  psctl export {job_id} -o model.safetensors   what it learned, as a file")
