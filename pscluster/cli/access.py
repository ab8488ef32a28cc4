"""Verbs of who may talk to a cluster: certs init, list, revoke; token create, list, revoke."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pscluster.cli import formatting as fmt
from pscluster.cli.control import duration_option
from pscluster.cli.output import output_option, print_answer, print_info, print_records
from pscluster.cli.session import Group, Session, Verb, pass_session
from pscluster.errors import NotFoundError, StorageError

if TYPE_CHECKING:
    from pscluster.client.members import Certificate, Token

_CERTIFICATES = ("NAME", "ROLE", "AGE", "EXPIRES-IN", "STATE")
_CERTIFICATES_WIDE = (*_CERTIFICATES, "SERIAL")
_TOKENS = ("ID", "ROLE", "AGE", "EXPIRES-IN", "USES-LEFT")
_ROLES = ("worker", "server", "user", "admin")
_LONGEST_SOCKET = 107


@click.group("certs", cls=Group)
def certs() -> None:
    """Make the cluster's certificate authority; see and revoke certificates."""


@certs.command("init", cls=Verb)
@click.option(
    "--state-dir", type=click.Path(path_type=Path), required=True, metavar="DIR", help="state directory of the master"
)
def init(state_dir: Path) -> None:
    """Make a cluster secure: write its id and its certificate authority into the master's state directory.

    Run it on the master's host, before the master starts. An authority that is there already is never overwritten.
    Prints the id of the cluster.
    """
    from pscluster.cli.local.cluster import write_token
    from pscluster.security.authority import Authority, cluster_id_of

    state_dir = state_dir.expanduser().absolute()
    cluster_id = cluster_id_of(state_dir)
    authority = Authority.create(state_dir / "certs", cluster_id)
    token = state_dir / "token"
    try:
        if not token.exists():
            write_token(token)
    except OSError as error:
        raise StorageError(f"cannot write {token}: {error.strerror}") from None
    for line in next_steps(state_dir, authority.sha256):
        print_info(line)
    print_answer(cluster_id)


def next_steps(state_dir: Path, sha256: str) -> list[str]:
    """What to type after `certs init`, on the master's host."""
    socket = f"unix:{state_dir / 'master.sock'}"
    if len(socket) - len("unix:") > _LONGEST_SOCKET:
        socket = "unix:/PATH/master.sock"
    return [
        f"certificate authority {sha256[:16]}... in {state_dir / 'certs'}",
        "whoever has its ca.key can become any member: keep a copy of this directory in a safe place, and no other",
        "next, on this host (ADDRESS: where other hosts reach it):",
        f"  psmaster --state-dir {state_dir} --listen {socket} --listen ADDRESS:7070",
        f"  psctl context add lab --address {socket} --token-file {state_dir / 'token'}",
        "  psctl --context lab token create --role worker",
    ]


@certs.command("list", cls=Verb)
@output_option()
@pass_session
def list_certificates(session: Session, form: str) -> None:
    """List the certificates of nodes and users that have not expired."""
    with session.connect() as cluster:
        found = cluster.members.certificates()
    print_records("Certificate", found, form, "name", _certificates_table, "no certificates have been made")


@certs.command("revoke", cls=Verb)
@click.argument("name")
@click.option("--role", type=click.Choice(_ROLES), help="only its certificates of this role")
@click.option("--yes", is_flag=True, help="do not ask on a terminal")
@pass_session
def revoke(session: Session, name: str, role: str | None, yes: bool) -> None:
    """Revoke every certificate of NAME, a node or user.

    In force on every daemon within a minute: its connections are closed, and no join token of its role that was
    made before its newest certificate admits anybody any more.
    """
    with session.connect() as cluster:
        found = [
            item
            for item in cluster.members.certificates()
            if item.name == name and role in (None, item.role) and not item.revoked
        ]
        if not found:
            raise NotFoundError(f"no valid certificate of {name}", action="see `psctl certs list`")
        if not yes and stdin_is_terminal():
            roles = ", ".join(sorted({item.role for item in found}))
            click.confirm(f"Revoke {len(found)} of {name} ({roles})? This cannot be undone.", abort=True, err=True)
        revoked = cluster.members.revoke(name, role or "")
    print_info(f"revoked {len(revoked)}; {name} needs a new join token to come back: psctl token create")
    print_answer(name)


def stdin_is_terminal() -> bool:
    """Whether somebody can answer a question."""
    return sys.stdin.isatty()


@click.group("token", cls=Group)
def token() -> None:
    """Make join tokens, with which hosts and users become members; see and revoke them."""


@token.command("create", cls=Verb)
@click.option("--role", type=click.Choice(_ROLES), required=True, help="what one becomes with it")
@duration_option("--ttl", "24h", "how long it can be used (90s, 15m, 24h, 7d)")
@click.option("--uses", type=click.IntRange(min=1), metavar="N", help="how many may join with it (default: any number)")
@pass_session
def create(session: Session, role: str, ttl: float, uses: int | None) -> None:
    """Make a join token, and print it, alone, on stdout. It is shown only now."""
    with session.connect() as cluster:
        text, token_id = cluster.members.create_token(role, ttl, uses or 0)
    many = f"{uses} time{'s' * (uses != 1)}" if uses else "any number of times"
    print_info(f"token {token_id}, for {fmt.duration(ttl)}, {many}; on the other host:")
    print_info(f"  {join_command(role)}")
    print_answer(text)


def join_command(role: str) -> str:
    """What to type where the token is used; PS_JOIN keeps it out of the list of processes."""
    if role in ("user", "admin"):
        return "PS_JOIN=TOKEN psctl context add NAME"
    return f"PS_JOIN=TOKEN ps{role} --node-id NAME --state-dir DIR"


@token.command("list", cls=Verb)
@output_option("table", "json", "yaml", "name")
@pass_session
def list_tokens(session: Session, form: str) -> None:
    """List the join tokens that can still be used, without their secrets."""
    with session.connect() as cluster:
        found = cluster.members.tokens()
    print_records("Token", found, form, "token_id", _tokens_table, "no join tokens; make one with `psctl token create`")


@token.command("revoke", cls=Verb)
@click.argument("token_id", metavar="ID")
@pass_session
def revoke_token(session: Session, token_id: str) -> None:
    """Make the join token ID useless. Who has joined with it stays a member: see `psctl certs revoke`."""
    with session.connect() as cluster:
        cluster.members.revoke_token(token_id)
    print_answer(token_id)


def _certificates_table(found: list[Certificate], wide: bool, now_s: float) -> str:
    rows = []
    for item in found:
        state = "revoked" if item.revoked else "valid"
        left, age = fmt.duration(item.expires_s - now_s), fmt.age(item.issued_s, now_s)
        rows.append([item.name, item.role, age, left, state, *([item.serial] if wide else [])])
    return fmt.table(_CERTIFICATES_WIDE if wide else _CERTIFICATES, rows)


def _tokens_table(found: list[Token], _wide: bool, now_s: float) -> str:
    rows = []
    for item in found:
        left = str(item.uses_left) if item.limited else "any"
        expires = fmt.duration(item.expires_s - now_s)
        rows.append([item.token_id, item.role, fmt.age(item.created_s, now_s), expires, left])
    return fmt.table(_TOKENS, rows)


COMMANDS = (certs, token)
