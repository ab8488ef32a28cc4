"""What every verb shares: the cluster it is for, the forms of its answer, and how an error becomes an exit code.

An answer is a table for people, versioned JSON or YAML for programs, or names for pipes.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pscluster.cli import formatting as fmt
from pscluster.errors import InternalError, PsError, UnreachableError
from pscluster.settings import ClientSettings, LocatedCluster, Resolved, resolve_with_origins

if TYPE_CHECKING:
    from pscluster.client import Cluster


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_DEFAULT_CONFIG = Path("~/.config/pscluster/config.toml")
_GLOBALS: tuple[tuple[str, str, str], ...] = (
    ("--state-dir", "DIR", "state directory of the local cluster [PS_STATE_DIR]"),
    ("--address", "ADDR", "master of another cluster: host:port or unix:/path [PS_ADDRESS]"),
    ("--token-file", "FILE", "its token [PS_TOKEN_FILE]"),
)
F = TypeVar("F", bound=Callable[..., Any])
API_VERSION = "ps/v1"
DOCUMENTS = ("json", "yaml")
FORMATS = ("table", "wide", *DOCUMENTS, "name")
Table = Callable[[Any, bool, float], str]
"""Formats records, wide or not, at a Unix time."""


class Session:
    """The global options of one call, read lazily, so that verbs without a cluster need none."""

    def __init__(self) -> None:
        self.flags: dict[str, str] = {}

    def resolved(self) -> Resolved[ClientSettings]:
        """The client settings with their origins. Raises SettingsError."""
        return resolve_with_origins(ClientSettings, self.flags, os.environ, self.config_file())

    def config_file(self) -> Path | None:
        """The file in PS_CONFIG, which must exist, or the user's default file, if there is one."""
        named = os.environ.get("PS_CONFIG")
        usual = _DEFAULT_CONFIG.expanduser()
        return Path(named) if named else (usual if usual.is_file() else None)

    def located(self) -> LocatedCluster:
        return self.resolved().settings.located(os.environ)

    def address_undo_hint(self) -> str:
        """What selects another cluster than the local one, and how to undo that; empty for the local one."""
        origin = self.resolved().origins["address"]
        undo = {"environment": "is set: unset it", "file": "sets it: remove `address`", "flag": "sets it: omit it"}
        return f"{origin.name} {undo[origin.kind]} to use the local cluster" if origin.kind in undo else ""

    def connect(self) -> Cluster:
        """Connect to the cluster; the caller closes it. Raises UnreachableError, AuthError, VersionSkewError."""
        from pscluster.client import Cluster

        return Cluster.connect_to(self.located())


pass_session = click.make_pass_decorator(Session, ensure=True)


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and param.name is not None:
        ctx.ensure_object(Session).flags[param.name] = value


def global_options(hidden: bool) -> list[click.Option]:
    """The options that select a cluster. Verbs accept them too (hidden), since people write them last."""
    return [
        click.Option([flag], metavar=metavar, help=text, expose_value=False, callback=_remember, hidden=hidden)
        for flag, metavar, text in _GLOBALS
    ]


class Verb(click.Command):
    """A command that also accepts the global options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(global_options(hidden=True))


class Psctl(click.Group):
    """The root group, which turns an error into a message on stderr and an exit code."""

    command_class = Verb

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(global_options(hidden=False))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PsError as error:
            print_error(_with_origin(error, ctx.ensure_object(Session)))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            print_info("interrupted")
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            click.echo(traceback.format_exc(), err=True, nl=False)
            wrapped = InternalError(f"{type(error).__name__}: {error}")
            print_error(wrapped)
            ctx.exit(wrapped.exit_code)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], sorted(self.commands), n=1, cutoff=0.5)
            suggestion = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"No such verb {args[0]!r}.{suggestion}", ctx)
        return super().resolve_command(ctx, args)


def print_error(error: PsError) -> None:
    """Print an error on stderr: code and cause, where the user's code raised, then what to do."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error.code}: {error.cause}", err=True)
    if frame := error.details.get("frame"):
        click.echo(f"{click.style('at:', fg='red')} {fmt.one_line(frame)}", err=True)
    if error.action:
        click.echo(f"{click.style('hint:', fg='cyan')} {error.action}", err=True)


def _with_origin(error: PsError, session: Session) -> PsError:
    """The error. When another cluster is selected, the hint to start a local one becomes what selected the other."""
    unhelped = isinstance(error, UnreachableError) and error.action == UnreachableError.default_action
    if unhelped and (given := session.address_undo_hint()):
        error.action = f"check that a master listens at {session.located().address} ({given})"
    return error


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
