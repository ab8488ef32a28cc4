"""Verbs about psctl itself: version, config show."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import click

from pscluster import __version__
from pscluster.cli import formatting as fmt
from pscluster.cli.output import document, output_option, print_document
from pscluster.cli.session import Session, Verb, answer, pass_session, say
from pscluster.errors import PsError


@click.command("version", cls=Verb)
@click.option("--client", is_flag=True, help="do not ask the master")
@output_option("table", "json", "yaml")
@pass_session
def version(session: Session, client: bool, form: str) -> None:
    """Print psctl's version and, when a cluster answers, the master's."""
    body: dict[str, Any] = {"client": __version__, "master": None, "protocol": None}
    if not client:
        try:
            with session.connect() as cluster:
                health = cluster.health()
            body.update(master=health.version, protocol=health.protocol)
        except PsError as error:
            say(f"no master: {error.cause}")
    if form != "table":
        print_document(document("Version", body), form)
        return
    answer(f"psctl {__version__}")
    if body["master"]:
        answer(f"psmaster {body['master']} (protocol {body['protocol']})")


@click.group("config")
def config() -> None:
    """What psctl's settings are."""


@config.command("show", cls=Verb)
@click.option("--origin", is_flag=True, help="tell where each value comes from")
@output_option("table", "json", "yaml")
@pass_session
def show(session: Session, origin: bool, form: str) -> None:
    """Print the settings in force: flag beats environment beats file beats default."""
    resolved = session.resolved()
    located = resolved.settings.located(os.environ)
    rows = []
    for field in dataclasses.fields(resolved.settings):
        source = resolved.origins[field.name]
        value = str(getattr(located, field.name))
        rows.append([field.name, value, f"{source.kind} {source.name}".strip()])
    if form == "table":
        columns = ("KEY", "VALUE", "ORIGIN") if origin else ("KEY", "VALUE")
        answer(fmt.table(columns, [row[: len(columns)] for row in rows]))
        return
    body: dict[str, Any] = {"values": {key: value for key, value, _ in rows}}
    if origin:
        body["origins"] = {key: source for key, _, source in rows}
    print_document(document("Config", body), form)


COMMANDS = (version, config)
