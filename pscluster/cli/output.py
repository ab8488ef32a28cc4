"""The forms an answer can take: a table for people, versioned JSON or YAML for programs, names for pipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from pscluster.cli.session import answer

F = TypeVar("F", bound=Callable[..., Any])

API_VERSION = "ps/v1"
FORMATS = ("table", "wide", "json", "yaml", "name")


def output_option(*formats: str) -> Callable[[F], F]:
    """-o/--output with the given formats, the first being the default."""
    choice = click.Choice(formats or FORMATS)
    default = (formats or FORMATS)[0]
    return click.option("-o", "--output", "form", type=choice, default=default, help="form of the answer")


def document(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """A versioned object: keys are only ever added within an apiVersion."""
    return {"apiVersion": API_VERSION, "kind": kind, **body}


def list_document(kind: str, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A versioned list of objects of one kind."""
    return document(f"{kind}List", {"items": [document(kind, item) for item in items]})


def print_document(body: dict[str, Any], form: str) -> None:
    """Print as "json" or "yaml" on stdout."""
    if form == "json":
        answer(json.dumps(body, indent=2, allow_nan=False))
        return
    import yaml

    answer(yaml.safe_dump(body, sort_keys=False, allow_unicode=True).rstrip())
