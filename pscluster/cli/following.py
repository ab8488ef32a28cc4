"""Follows a job until it ends: a progress bar on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from pscluster.cli import formatting as fmt
from pscluster.cli.describe import counts_tokens, eta_s
from pscluster.cli.evaluations import Evaluations
from pscluster.cli.output import print_info, stderr_is_terminal
from pscluster.cli.session import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from pscluster.client import Cluster, Event, Job
    from pscluster.errors import UnreachableError
    from pscluster.settings import LocatedCluster

MAX_OUTAGE_S = 600.0
"""How long to wait for an unreachable master."""

LINE_INTERVAL_S = 2.0
_FRESH_S = 5.0
"""A warning older than this when following begins is printed with its age."""
# States, bar and last lines show these already; `psctl describe` has them all.
_ROUTINE = frozenset({"Submitted", "Admitted", "Running", "Snapshot", "Finished", "Succeeded", "Failed", "Stopped"})
_BAR_WIDTH = 28
_NARROWEST = 4  # a narrower bar shows nothing


class Narrator:
    """Prints each change of state or reason and each new event once, in order."""

    def __init__(self) -> None:
        self._state = ""
        self._reason = ""
        self._last_event: Event | None = None
        self._seen_any = False

    def news(self, job: Job, now_s: float) -> list[str]:
        """The lines to print for this state of the job."""
        lines = self._events(job) if self._seen_any else self._first_events(job, now_s)
        if job.events:
            self._last_event = job.events[-1]
        if (job.state, job.reason) != (self._state, self._reason):
            # A reason may change while a job waits or recovers; the end has its own line.
            if not job.ended and (job.state != self._state or job.reason):
                lines.append(f"{job.state}{': ' + fmt.one_line(job.reason) if job.reason else ''}")
            self._state, self._reason = job.state, job.reason
        self._seen_any = True
        return lines

    def _events(self, job: Job) -> list[str]:
        """Events after the last printed one."""
        fresh = list(job.events)
        if self._last_event in fresh:
            fresh = fresh[len(fresh) - fresh[::-1].index(self._last_event) :]
        return [event_line(event) for event in fresh if _is_warning(event) or not _is_routine(event, job)]

    def _first_events(self, job: Job, now_s: float) -> list[str]:
        """Only warnings since the job was last resumed; the history is in `psctl describe`. An old one is printed with
        its age, so that it does not look new."""
        resumed = max((n for n, event in enumerate(job.events) if event.reason == "Resumed"), default=-1)
        warnings = [event for event in job.events[resumed + 1 :] if _is_warning(event)]
        return [event_line(e, now_s - e.time_s if now_s - e.time_s > _FRESH_S else None) for e in warnings]


def _is_warning(event: Event) -> bool:
    """Whether it must be printed in any case. The error that ends the job is not: it is the last line anyway."""
    return event.warning and event.reason != "Failed"


def _is_routine(event: Event, job: Job) -> bool:
    return event.reason in _ROUTINE or (event.reason == "Planned" and job.step == 0)


def event_line(event: Event, age_s: float | None = None) -> str:
    """One event; with its age if that is given."""
    when = f"{fmt.duration(age_s)} ago: " if age_s is not None else ""
    return f"{'! ' if event.warning else ''}{when}{event.reason}: {fmt.one_line(event.message)}"


def progress_parts(job: Job) -> list[str]:
    """The parts of a line of progress: step, loss, speed, time left, workers."""
    parts = [f"step {job.step}/{job.final_step}" if job.final_step else f"step {job.step}"]
    parts.append(f"loss {fmt.number(job.loss)}")
    if counts_tokens(job):
        parts.append(f"{fmt.count(job.weight_per_s)} tokens/s")
    elif job.samples_per_s > 0:
        parts.append(f"{fmt.count(job.samples_per_s)} samples/s")
    left = eta_s(job)
    parts.append(f"{fmt.duration(left)} left" if left is not None else "")
    parts.append(f"{job.workers_active}/{job.workers_wanted} workers")
    return [part for part in parts if part]


def ending_line(job: Job) -> str:
    ran = fmt.duration((job.ended_s or 0) - job.started_s) if job.started_s else "0s"
    parts = [f"{job.job_id} {job.state} at step {job.step} after {ran}"]
    if job.loss is not None:
        parts.append(f"loss {fmt.number(job.loss)}")
    if job.parameters_sha256:
        parts.append(f"parameters {job.parameters_sha256[:12]}")
    return ", ".join(parts)


class PlainView:
    """Shows the progress of a job as lines: changes at once, progress at most every two seconds."""

    def __init__(self) -> None:
        self._progress_s = float("-inf")
        self._step = -1
        self._note = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def print_line(self, line: str) -> None:
        print_info(line)

    def update(self, job: Job) -> None:
        now_s = time.monotonic()
        if job.step not in (0, self._step) and not job.ended and now_s - self._progress_s >= LINE_INTERVAL_S:
            self._progress_s, self._step = now_s, job.step
            print_info("  ".join(progress_parts(job)))

    def note(self, text: str, since: str = "") -> None:  # noqa: ARG002 - on a permanent line it would become outdated
        """Show a temporary note, or none. `since`: how long it has applied; a change of it alone is no new note."""
        if text and text != self._note:
            print_info(text)
        self._note = text


class BarView(PlainView):
    """A bar in place, with changes printed above it. In a narrow terminal first the bar shrinks, then the text beside
    it; the name stays complete."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(max_width=_BAR_WIDTH)),
            TextColumn("{task.fields[line]}", markup=False),
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
            self._task, description=job.name, total=job.final_step, completed=job.step, line=self._shown
        )

    def note(self, text: str, since: str = "") -> None:
        self.progress.update(self._task, line=f"{text} ({since})" if text else self._shown)


def bar_text(job: Job, columns: int) -> str:
    """The text beside the bar, if possible in at most `columns` characters: progress while the job runs, before that
    only the state. The reason is printed above, and would leave no space for the bar."""
    if job.state != "RUNNING" or not job.step:
        return job.state
    parts = progress_parts(job)
    while len(parts) > 1 and len("  ".join(parts)) > columns:
        del parts[min(2, len(parts) - 1)]  # the speed first, the step never
    return "  ".join(parts)


def follow(cluster: Cluster, job_id: str, view: PlainView, located: LocatedCluster) -> Job:
    """Show a job until it has ended; returns its last state. Blocks; an unreachable master is waited for."""
    from pscluster.client import ReconnectingStream

    def on_outage(_error: UnreachableError, seconds: float) -> None:
        view.note(outage_note(located, MAX_OUTAGE_S), f"{seconds:.0f} s")

    narrator = Narrator()
    job: Job | None = None
    with view:
        stream = ReconnectingStream(max_outage_s=MAX_OUTAGE_S, on_outage=on_outage, on_reconnect=lambda: view.note(""))
        evaluations = Evaluations(cluster, stream)
        for job in cluster.watch(job_id, stream):
            for line in narrator.news(job, time.time()) + evaluations.news(job):
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

    Ctrl-C exits 130; the job continues, which is printed unless the caller ends it (`tied`)."""
    from pscluster.client import end_error

    view = BarView() if stderr_is_terminal() else PlainView()
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
