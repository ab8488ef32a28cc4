"""The verb of networks: network rules."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from pscluster.cli.output import print_answer, print_info
from pscluster.cli.session import Group, Session, Verb, pass_session

if TYPE_CHECKING:
    from pscluster.cli.firewall import Ports

_KINDS = ("master", "worker", "server", "user")
_FORMATS = ("text", "iptables", "nftables", "ufw")
_MASTER_PORT = 7070


class _PortRange(click.ParamType[str]):
    name = "A-B"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        numbers = [int(text) for text in value.split("-")] if re.fullmatch(r"\d{1,5}(-\d{1,5})?", value) else [0]
        if not (1 <= numbers[0] <= numbers[-1] <= 65535):
            self.fail(f"{value!r} is neither a port nor a range like 7100-7199", param, ctx)
        return value


@click.group("network", cls=Group)
def network() -> None:
    """What the cluster needs of the network."""


@network.command("rules", cls=Verb)
@click.option("--format", "form", type=click.Choice(_FORMATS), default="text", help="of which firewall")
@click.option("--for", "kinds", type=click.Choice(_KINDS), multiple=True, help="only this kind of host; repeatable")
@click.option("--offline", is_flag=True, help="do not ask the master: from the options below")
@click.option("--master-port", type=click.IntRange(1, 65535), help="port of psmaster --listen (7070)")
@click.option("--join-port", type=click.IntRange(1, 65535), help="port of psmaster --join-listen (the next one)")
@click.option("--depot-port", type=_PortRange(), help="port of psserver --depot-listen")
@click.option("--data-ports", type=_PortRange(), help="psserver --data-ports")
@pass_session
def rules(
    session: Session,
    form: str,
    kinds: tuple[str, ...],
    offline: bool,
    master_port: int | None,
    join_port: int | None,
    depot_port: str | None,
    data_ports: str | None,
) -> None:
    """Print what the firewall of each kind of host must let through.

    Ports come from what the cluster's members advertise, or with --offline from the options. Workers accept nothing:
    they dial out only.
    """
    from pscluster.cli import firewall

    given = (master_port, join_port, depot_port, data_ports)
    if not offline and any(given):
        raise click.UsageError("ports are given with --offline only")
    ports = _planned(*given) if offline else _advertised(session)
    if ports.master or ports.servers:
        print_answer("\n".join(firewall.lines(firewall.rules(ports), form, kinds or firewall.KINDS)))
    else:
        print_info("the cluster listens on this machine alone: no other host needs to reach it")
    if any(server.data_ports == firewall.ANY_PORT for server in ports.servers):
        print_info("narrow the range of data ports with psserver --data-ports A-B")


def _planned(master_port: int | None, join_port: int | None, depot_port: str | None, data_ports: str | None) -> Ports:
    from pscluster.cli.firewall import ANY_PORT, Ports, Server

    listen = master_port or _MASTER_PORT
    server = Server(name="", depot_port=depot_port or ANY_PORT, data_ports=data_ports or ANY_PORT)
    return Ports(master=(str(listen),), join=(str(join_port or listen + 1),), servers=(server,))


def _advertised(session: Session) -> Ports:
    from pscluster.cli.firewall import advertised

    with session.connect() as cluster:
        return advertised(cluster.health(), cluster.nodes())


COMMANDS = (network,)
