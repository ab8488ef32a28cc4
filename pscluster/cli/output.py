"""How psctl prints: errors and messages for a person on stderr, answers on stdout.

An answer is a table for people, versioned JSON or YAML for programs, or names for pipes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from pscluster.cli import formatting as fmt
from pscluster.errors import PsError
from pscluster.user_frames import place_of

F = TypeVar("F", bound=Callable[..., Any])
API_VERSION = "ps/v1"
DOCUMENTS = ("json", "yaml")
FORMATS = ("table", "wide", *DOCUMENTS, "name")
Table = Callable[[Any, bool, float], str]
"""Formats records, wide or not, at a Unix time."""


def print_error(error: PsError) -> None:
    """Print an error on stderr: code and cause, where the user's code raised, then what to do."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error.code}: {error.cause}", err=True)
    if frame := place_of(error.details):
        click.echo(f"{click.style('at:', fg='red')} {fmt.one_line(frame)}", err=True)
    if error.action:
        click.echo(f"{click.style('hint:', fg='cyan')} {error.action}", err=True)


def print_info(text: str) -> None:
    """Print a line for a person on stderr; stdout is for answers."""
    click.echo(text, err=True)


def print_answer(text: str) -> None:
    click.echo(text)


def stderr_is_terminal() -> bool:
    """Whether colours and bars make sense. TERM=dumb says they do not."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def output_option(*formats: str) -> Callable[[F], F]:
    """-o/--output with the given formats; the first is the default."""
    choice = click.Choice(formats or FORMATS)
    default = (formats or FORMATS)[0]
    return click.option("-o", "--output", "form", type=choice, default=default, help="form of the answer")


def print_records(kind: str, records: Sequence[Any], form: str, id_field: str, table: Table, otherwise: str) -> None:
    """Print a list of records: as a table for people; without any, `otherwise` on stderr."""
    if form == "name":
        for record in records:
            print_answer(getattr(record, id_field))
    elif form in DOCUMENTS:
        items = [{"apiVersion": API_VERSION, "kind": kind, **record.to_dict()} for record in records]
        print_document(f"{kind}List", {"items": items}, form)
    elif records:
        print_answer(table(records, form == "wide", time.time()))
    else:
        print_info(otherwise)


def print_document(kind: str, body: dict[str, Any], form: str) -> None:
    """Print as "json" or "yaml" on stdout, versioned: keys are only ever added within an apiVersion."""
    body = {"apiVersion": API_VERSION, "kind": kind, **body}
    if form == "json":
        print_answer(json.dumps(body, indent=2, allow_nan=False))
        return
    import yaml

    print_answer(yaml.safe_dump(body, sort_keys=False, allow_unicode=True).rstrip())
