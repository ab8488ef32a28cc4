"""Verbs of contexts, clusters under names of the user's: context add, use, list, show, remove."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pscluster.cli import formatting as fmt
from pscluster.cli.output import output_option, print_answer, print_document, print_info, print_records
from pscluster.cli.session import Group, Verb, complete_context
from pscluster.errors import PsError

if TYPE_CHECKING:
    from pscluster.client.contexts import Context, ContextFile, Contexts

_COLUMNS = ("CURRENT", "NAME", "ADDRESS", "CREDENTIALS")
_COLUMNS_WIDE = (*_COLUMNS, "USER", "ROLE", "EXPIRES-IN")


@click.group("context", cls=Group)
def context() -> None:
    """Keep clusters under names, and select one."""


@context.command("add", cls=Verb)
@click.argument("name")
@click.option("--join", "token", metavar="TOKEN", help="join token of a secured cluster, or @FILE with it [PS_JOIN]")
@click.option("--user", metavar="NAME", help="your name there (default: that of this account); only with --join")
@click.option("--address", metavar="ADDR", help="master of a cluster without certificates: host:port or unix:/path")
@click.option("--token-file", type=click.Path(path_type=Path), metavar="FILE", help="its token; only with --address")
def add(name: str, token: str | None, user: str | None, address: str | None, token_file: Path | None) -> None:
    """Add a cluster under NAME.

    With --join it becomes a member: the token is exchanged for a certificate, which psctl renews. The key is made and
    kept on this machine.
    """
    from pscluster.client.contexts import Context, ContextFile

    file = ContextFile.of(os.environ)
    if address is not None or token_file is not None:
        if token or user or not address or not token_file:
            raise click.UsageError("give --join, or --address with --token-file")
        if ":" not in address:
            raise click.BadParameter(f"{address!r} is neither host:port nor unix:/path", param_hint="--address")
        file.add(Context(name=name, address=address, token_file=token_file.expanduser().absolute()))
    else:
        token = token or os.environ.get("PS_JOIN")
        if not token:
            raise click.UsageError("give --join, or --address with --token-file")
        _join(file, name, token, user)
    print_info(f"added; use it with `psctl context use {name}`, or once with --context {name}")
    print_answer(name)


def _join(file: ContextFile, name: str, token: str, user: str | None) -> None:
    import getpass

    from pscluster.client.contexts import Context, refuse_known
    from pscluster.client.credentials import join_as_user, read_join_text

    planned = Context(name=name, credentials_dir=file.credentials_dir(name))  # or say what is wrong before joining
    refuse_known(file.read(), name)
    credentials, address = join_as_user(read_join_text(token), user or getpass.getuser())
    credentials.save(file.credentials_dir(name))
    file.add(Context(name=name, address=address, credentials_dir=planned.credentials_dir))
    identity = credentials.identity
    print_info(f"{identity.name} is {identity.role} of the cluster {identity.cluster_id} at {address}")


@context.command("use", cls=Verb)
@click.argument("name", shell_complete=complete_context)
def use(name: str) -> None:
    """Select the context that psctl uses without --context; `local` is the local cluster."""
    from pscluster.client.contexts import ContextFile
    from pscluster.settings import environment_name

    file = ContextFile.of(os.environ)
    found = file.use(name)
    for key in found.overridden_by:
        print_info(f"`{key}` in {file.path} beats the context: remove it there")
    for key in ("context", "address", "state_dir"):
        if os.environ.get(environment_name(key)):
            print_info(f"{environment_name(key)} is set and beats the selected context: unset it")
    print_answer(name)


@context.command("list", cls=Verb)
@output_option()
def list_contexts(form: str) -> None:
    """List the contexts; the selected one has a *."""
    from pscluster.client.contexts import ContextFile

    found = ContextFile.of(os.environ).read()
    records = [_Shown(_described(found, item)) for item in _all(found)]
    print_records("Context", records, form, "name", _table, "")


@context.command("show", cls=Verb)
@click.argument("name", required=False, shell_complete=complete_context)
@output_option("text", "json", "yaml")
def show(name: str | None, form: str) -> None:
    """Show the context NAME, or the selected one: address, user, role, how long its certificate is valid."""
    from pscluster.client.contexts import LOCAL, ContextFile

    found = ContextFile.of(os.environ).read()
    body = _described(found, found.get(name or found.current or LOCAL))
    if form != "text":
        print_document("Context", body, form)
        return
    rows = {key: value for key, value in body.items() if value not in (None, "")}
    rows |= {key: fmt.clock(rows[key]) for key in ("expires_s", "renew_at_s") if key in rows}
    print_answer("\n".join(f"{key.removesuffix('_s').replace('_', ' ')}: {value}" for key, value in rows.items()))


@context.command("remove", cls=Verb)
@click.argument("name", shell_complete=complete_context)
def remove(name: str) -> None:
    """Forget the context NAME, with its key and certificate."""
    from pscluster.client.contexts import ContextFile

    found = ContextFile.of(os.environ).remove(name)
    if found.credentials_dir:
        print_info("its certificate stays valid until it expires; an admin revokes it with `psctl certs revoke`")
    print_answer(name)


class _Shown:
    """One row of the list, as records are."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.name = str(body["name"])

    def to_dict(self) -> dict[str, Any]:
        return self.body


def _all(found: Contexts) -> list[Context]:
    from pscluster.client.contexts import LOCAL

    names = sorted({*found.by_name, LOCAL}, key=lambda name: (name != LOCAL, name))
    return [found.get(name) for name in names]


def _described(found: Contexts, item: Context) -> dict[str, Any]:
    """A context with what its certificate says; `problem` is why that cannot be read."""
    from pscluster.client.contexts import LOCAL
    from pscluster.settings import default_state_dir, master_address, token_file

    state_dir = item.state_dir or default_state_dir(os.environ)
    body: dict[str, Any] = {
        "name": item.name,
        "current": item.name == (found.current or LOCAL),
        "address": item.address or master_address(state_dir),
        "token_file": str(item.token_file or token_file(state_dir)) if item.credentials_dir is None else None,
        "credentials_dir": str(item.credentials_dir) if item.credentials_dir else None,
        "user": None, "role": None, "cluster_id": None, "expires_s": None, "renew_at_s": None, "problem": None,
    }  # fmt: skip
    if item.credentials_dir is None:
        return body
    from pscluster.security.credentials import Credentials

    try:
        stored = Credentials.load(item.credentials_dir)
    except PsError as error:
        return {**body, "problem": error.cause}
    identity = stored.identity
    return {
        **body, "user": identity.name, "role": str(identity.role), "cluster_id": identity.cluster_id,
        "expires_s": stored.not_after_s, "renew_at_s": stored.renew_at_s,
    }  # fmt: skip


def _table(shown: list[_Shown], wide: bool, now_s: float) -> str:
    rows = []
    for body in (item.body for item in shown):
        row = ["*" if body["current"] else "", body["name"], body["address"], _credentials(body, now_s)]
        if wide:
            left = fmt.duration(body["expires_s"] - now_s) if body["expires_s"] else ""
            row += [body["user"] or "", body["role"] or "", left]
        rows.append(row)
    return fmt.table(_COLUMNS_WIDE if wide else _COLUMNS, rows)


def _credentials(body: dict[str, Any], now_s: float) -> str:
    if body["problem"]:
        return str(body["problem"])
    if body["credentials_dir"]:
        return "certificate" if body["expires_s"] > now_s else "certificate (expired)"
    return "token"


COMMANDS = (context,)
