"""The verb of settings: config show, of psctl itself or of a daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from pscluster.cli import formatting as fmt
from pscluster.cli.output import output_option, print_answer, print_document
from pscluster.cli.session import Group, Session, Verb, pass_session
from pscluster.errors import SettingsError

_DAEMONS = ("master", "worker", "server")
_DEADLINE_S = 60.0


@click.group("config", cls=Group)
def config() -> None:
    """Show settings, of psctl or of a daemon."""


@config.command("show", cls=Verb)
@click.option("--origin", is_flag=True, help="also print where each value comes from")
@click.option("--daemon", type=click.Choice(_DAEMONS), help="the settings that this daemon would start with, here")
@click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE", help="settings file of --daemon")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@output_option("table", "json", "yaml")
@pass_session
def show(
    session: Session, origin: bool, daemon: str | None, file: Path | None, flags: tuple[str, ...], form: str
) -> None:
    """Print the settings in effect; secrets are shown as ***.

    A flag overrides the environment, then the file, then the selected context, then the default. With --daemon, FLAGS
    after `--` are those of the daemon's command line.
    """
    if daemon is None and (file or flags):
        raise click.UsageError("--config and FLAGS are for --daemon")
    found = _of_client(session) if daemon is None else _of_daemon(daemon, file, flags)
    if form == "table":
        columns = ("KEY", "VALUE", "ORIGIN") if origin else ("KEY", "VALUE")
        cells = [[row["key"], "" if row["value"] is None else row["value"], row["origin"]] for row in found]
        print_answer(fmt.table(columns, [row[: len(columns)] for row in cells]))
        return
    body: dict[str, Any] = {"values": {row["key"]: row["value"] for row in found}}
    if origin:
        body["origins"] = {row["key"]: row["origin"] for row in found}
    print_document("Config", body, form)


def _of_client(session: Session) -> list[dict[str, Any]]:
    from pscluster.settings_report import rows

    resolved = session.resolved()
    return rows(resolved, resolved.settings.located(os.environ))


def _of_daemon(name: str, file: Path | None, flags: tuple[str, ...]) -> list[dict[str, Any]]:
    """Asked of the daemon's own program, which ends at once. Raises SettingsError with what it says."""
    from pscluster.cli.local.processes import MODULE

    words = [sys.executable, "-P", "-m", MODULE[name], "--show-settings", *(["--config", str(file)] if file else [])]
    done = subprocess.run([*words, *flags], capture_output=True, text=True, check=False, timeout=_DEADLINE_S)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it printed no reason"]
        raise SettingsError(f"ps{name} would not start: {lines[-1]}")
    return list(json.loads(done.stdout))


COMMANDS = (config,)
