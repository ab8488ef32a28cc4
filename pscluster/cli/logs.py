"""Verbs that read the output of a job: logs, metrics."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from pscluster.cli import formatting as fmt
from pscluster.cli.output import output_option, print_answer, print_document, print_info
from pscluster.cli.session import Session, Verb, pass_session
from pscluster.errors import SettingsError

if TYPE_CHECKING:
    from pscluster.client import LogLine

_COLOURS = ("cyan", "green", "yellow", "blue", "magenta", "bright_cyan", "bright_green", "bright_yellow")


@click.command("logs", cls=Verb)
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="continue until the job has ended")
@click.option("--worker", "trainer", type=click.IntRange(min=0), default=None, help="only the trainer of this rank")
@click.option("--server", "partition", type=click.IntRange(min=0), default=None, help="only this partition")
@click.option("--tail", type=click.IntRange(min=0), default=0, help="only this many last lines; 0: all that are kept")
@click.option("--since", default=None, metavar="T", help="only newer lines: 10m, 2h, or a time like 2026-01-31T08:00")
@click.option("--timestamps", is_flag=True, help="begin each line with its time")
@pass_session
def logs(
    session: Session,
    job: str,
    follow: bool,
    trainer: int | None,
    partition: int | None,
    tail: int,
    since: str | None,
    timestamps: bool,
) -> None:
    """Print the output of JOB's processes. Each line begins with the role and rank."""
    if trainer is not None and partition is not None:
        raise click.UsageError("--worker and --server cannot be combined")
    kind = "trainer" if trainer is not None else "partition" if partition is not None else ""
    rank = trainer if trainer is not None else partition if partition is not None else -1
    since_s = _since(since)
    with session.connect() as cluster:
        lines = 0
        for line in cluster.logs(job, follow=follow, kind=kind, rank=rank, tail=tail, since_s=since_s):
            click.echo(log_text(line, timestamps))
            lines += 1
    if not lines:
        print_info("no output" + (" of this process or time" if kind or since_s else ""))


def log_text(line: LogLine, timestamps: bool) -> str:
    """One line: its source, coloured by rank (click drops the colour when stdout is no terminal), and its text."""
    digits = "".join(c for c in line.source if c.isdigit())
    colour = _COLOURS[(int(digits or "0") + (4 if line.source.startswith("partition") else 0)) % len(_COLOURS)]
    when = f"{fmt.clock(line.time_s)} " if timestamps else ""
    return f"{when}{click.style(line.source, fg=colour)} | {line.text}"


def _since(text: str | None) -> float:
    if text is None:
        return 0.0
    try:
        return fmt.parse_since(text, time.time())
    except SettingsError as error:
        raise click.UsageError(f"--since: {error.cause}") from None


@click.command("metrics", cls=Verb)
@click.argument("job")
@click.option("--from-step", type=click.IntRange(min=0), default=0, help="only steps above this one")
@output_option("table", "json", "csv")
@pass_session
def metrics(session: Session, job: str, from_step: int, form: str) -> None:
    """Print JOB's committed steps and evaluations, oldest first."""
    with session.connect() as cluster:
        found = cluster.job(job)
        records = list(cluster.metrics(found.job_id, from_step))
    if form == "json":
        print_document("MetricsList", {"job_id": found.job_id, "name": found.name, "items": records}, form)
    elif form == "csv":
        click.echo(metrics_csv(records), nl=False)
    elif records:
        print_answer(metrics_table(records))
    else:
        print_info(f"{found.job_id} has committed no step {f'above {from_step}' if from_step else 'yet'}")


def flatten(record: dict[str, Any]) -> dict[str, Any]:
    """Nested objects as dotted columns: {"metrics": {"loss": 1}} -> {"metrics.loss": 1}. Lists stay JSON."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": v for inner, v in flatten(value).items()})
        else:
            flat[key] = json.dumps(value) if isinstance(value, list) else value
    return flat


def metrics_csv(records: Iterable[dict[str, Any]]) -> str:
    """CSV with one column for each key that any record has, in order of appearance; empty where it has none."""
    rows = [flatten(record) for record in records]
    sink = io.StringIO()
    writer = csv.DictWriter(sink, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def metrics_table(records: Iterable[dict[str, Any]]) -> str:
    """The same as a table, numbers shortened."""
    rows = [flatten(record) for record in records]
    columns = [column for column in _columns(rows) if column != "time_s"]
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    return fmt.table([column.upper().replace("_", "-") for column in columns], cells)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return fmt.number(value)
    return "-" if value is None else str(value)


COMMANDS = (logs, metrics)
