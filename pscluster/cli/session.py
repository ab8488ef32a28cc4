"""What every verb shares: the cluster it is for, and how an error becomes an exit code."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from pscluster.cli.output import print_error, print_info
from pscluster.errors import InternalError, PsError, UnreachableError
from pscluster.spelling import nearest

if TYPE_CHECKING:
    from pscluster.client import Cluster
    from pscluster.settings import ClientSettings, LocatedCluster, Resolved


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_GLOBALS: tuple[tuple[str, str, str], ...] = (
    ("--context", "NAME", "a cluster of `psctl context list` [PS_CONTEXT]"),
    ("--state-dir", "DIR", "state directory of the local cluster [PS_STATE_DIR]"),
    ("--address", "ADDR", "master of another cluster: host:port or unix:/path [PS_ADDRESS]"),
    ("--token-file", "FILE", "its token [PS_TOKEN_FILE]"),
)


class Session:
    """The global options of one call, read lazily, so that verbs without a cluster need none."""

    def __init__(self) -> None:
        self.flags: dict[str, str] = {}

    def resolved(self) -> Resolved[ClientSettings]:
        """The client settings with their origins. Raises SettingsError, NotFoundError for an unknown context."""
        from pscluster.client.contexts import resolve_client

        return resolve_client(self.flags, os.environ)

    def located(self) -> LocatedCluster:
        return self.resolved().settings.located(os.environ)

    def address_undo_hint(self) -> str:
        """What selects another cluster than the local one, and how to undo that; empty for the local one."""
        origin = self.resolved().origins["address"]
        undo = {
            "environment": "is set: unset it",
            "file": "sets it: remove `address`",
            "flag": "sets it: omit it",
            "context": "is the selected context: give --context local",
        }
        return f"{origin.name} {undo[origin.kind]} to use the local cluster" if origin.kind in undo else ""

    def connect(self) -> Cluster:
        """Connect to the cluster; the caller closes it. Raises UnreachableError, AuthError, VersionSkewError."""
        from pscluster.client import Cluster

        return Cluster.connect_to(self.located())


pass_session = click.make_pass_decorator(Session, ensure=True)


def complete_context(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The names of contexts, for the shell. None for a settings file that cannot be read: a shell shows no errors."""
    from pscluster.client.contexts import LOCAL, ContextFile

    try:
        names = {LOCAL, *ContextFile.of(os.environ).read().by_name}
    except PsError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and param.name is not None:
        ctx.ensure_object(Session).flags[param.name] = value


def global_options(hidden: bool) -> list[click.Option]:
    """The options that select a cluster. Verbs accept them too (hidden), since people write them last."""
    return [
        click.Option(
            [flag],
            metavar=metavar,
            help=text,
            expose_value=False,
            callback=_remember,
            hidden=hidden,
            shell_complete=complete_context if flag == "--context" else None,
        )
        for flag, metavar, text in _GLOBALS
    ]


class Verb(click.Command):
    """A command that also accepts the global options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = {param.name for param in self.params}
        self.params.extend(option for option in global_options(hidden=True) if option.name not in own)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _options_suggested(self):
            return super().parse_args(ctx, args)


@contextmanager
def _options_suggested(command: click.Command) -> Iterator[None]:
    """In place of click's suggestion for an unknown option: the nearest that `command` shows, or none."""
    try:
        yield
    except click.NoSuchOption as error:
        shown = {flag for flag, _, _ in _GLOBALS} | {
            name
            for param in command.params
            if isinstance(param, click.Option) and not param.hidden
            for name in param.opts
        }
        near = nearest(error.option_name.lstrip("-"), [name.removeprefix("--") for name in shown])
        suggestion = f" Did you mean --{near}?" if near else ""
        message = f"No such option {error.option_name!r}.{suggestion}"
        raise click.NoSuchOption(error.option_name, message, ctx=error.ctx) from None


class Group(click.Group):
    """A command with verbs below it. The nearest verb or option is suggested for one that does not exist."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _options_suggested(self):
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            near = nearest(args[0], self.commands)
            suggestion = f" Did you mean {near}?" if near else ""
            raise click.UsageError(f"No such verb {args[0]!r}.{suggestion}", ctx)
        return super().resolve_command(ctx, args)


class Psctl(Group):
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


def _with_origin(error: PsError, session: Session) -> PsError:
    """The error. When another cluster is selected, the hint to start a local one becomes what selected the other."""
    if isinstance(error, UnreachableError) and (given := session.address_undo_hint()):
        if error.action == UnreachableError.default_action:
            error.action = f"check that a master listens at {session.located().address} ({given})"
        elif "reason" in error.details:  # it was dialled once more, to say why
            error.action = f"{error.action} ({given})"
    return error
