"""What the firewall of each kind of host must let through, from what a cluster's members advertise. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pscluster.address import is_loopback
from pscluster.client.records import Health, Node

KINDS = ("master", "worker", "server", "user")
ANY_PORT = "32768-60999"
"""Where Linux chooses a port for a listener that is not given one (net.ipv4.ip_local_port_range)."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where one server listens for other hosts. Ports: "7100" or "7100-7199"; None: no depot."""

    name: str
    depot_port: str | None
    data_ports: str


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where a cluster listens for other hosts."""

    master: tuple[str, ...]
    join: tuple[str, ...]
    servers: tuple[Server, ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """On a `host` kind: accept TCP connections to `ports` from `peers`, or reach `ports` of `peers`. `only`: the one
    host of the kind that it is about; empty: each."""

    host: str
    direction: str
    ports: str
    peers: tuple[str, ...]
    purpose: str
    only: str = ""


def advertised(health: Health, nodes: Iterable[Node]) -> Ports:
    """Where a running cluster listens for other hosts: loopback and Unix sockets need no rule."""
    servers = []
    for node in nodes:
        if node.role == "server" and node.advertised_host and not is_loopback(node.advertised_host):
            depot = port_of(node.depot_address) if node.depot_address else None
            servers.append(Server(name=node.node_id, depot_port=depot, data_ports=node.data_ports or ANY_PORT))
    return Ports(master=_ports(health.addresses), join=_ports(health.join_addresses), servers=tuple(servers))


def rules(ports: Ports) -> list[Rule]:
    """All rules, by kind of host. Nobody dials a worker."""
    found = [
        Rule(host="master", direction="accept", ports=port, peers=("worker", "server", "user"), purpose="calls")
        for port in ports.master
    ]
    found += [
        Rule(host="master", direction="accept", ports=port, peers=("new member",), purpose="joins")
        for port in ports.join
    ]
    for host in ("worker", "server", "user"):
        found += [
            Rule(host=host, direction="reach", ports=port, peers=("master",), purpose="calls") for port in ports.master
        ]
        found += [
            Rule(host=host, direction="reach", ports=port, peers=("master",), purpose="joins") for port in ports.join
        ]
    for server in ports.servers:
        found += _of_server(server)
    return sorted(_unique(found), key=lambda rule: KINDS.index(rule.host))


def _of_server(server: Server) -> Iterator[Rule]:
    data, depot = server.data_ports, server.depot_port
    callers = {"gradients and values": (data, ("worker", "server")), "snapshots": (depot, ("server", "user"))}
    for purpose, (port, peers) in callers.items():
        if port is not None:
            yield Rule(host="server", direction="accept", ports=port, peers=peers, purpose=purpose, only=server.name)
            for peer in peers:
                yield Rule(host=peer, direction="reach", ports=port, peers=("server",), purpose=purpose)


def _unique(found: Sequence[Rule]) -> list[Rule]:
    return list(dict.fromkeys(found))


def lines(found: Sequence[Rule], form: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """The rules for `kinds` of host, as text or as commands. Commands accept only: what may be reached is a comment,
    for hosts that filter what they send."""
    result = []
    for kind in kinds:
        own = [rule for rule in found if rule.host == kind]
        if form == "text":
            result += [f"{kind}:", *map(_text, own)]
            result += [] if any(rule.direction == "accept" for rule in own) else ["  accept  nothing"]
            continue
        result += [f"# {kind}"]
        for rule in own:
            result += _commands(rule, form) if rule.direction == "accept" else [f"# {_text(rule).strip()}"]
    return result


def _text(rule: Rule) -> str:
    preposition = "from" if rule.direction == "accept" else "on"
    only = f" (on {rule.only})" if rule.only else ""
    peers = ", ".join(rule.peers)
    return f"  {rule.direction:<6}  tcp {rule.ports:<12} {preposition:<4} {peers}: {rule.purpose}{only}"


def _commands(rule: Rule, form: str) -> list[str]:
    colons, comment = rule.ports.replace("-", ":"), f"pscluster {rule.purpose}" + (f" {rule.only}" * bool(rule.only))
    if form == "iptables":
        return [
            f'{program} -A INPUT -p tcp --dport {colons} -m comment --comment "{comment}" -j ACCEPT'
            for program in ("iptables", "ip6tables")
        ]
    if form == "nftables":
        return [f'nft add rule inet filter input tcp dport {rule.ports} accept comment \\"{comment}\\"']
    return [f"ufw allow proto tcp from any to any port {colons} comment '{comment}'"]


def port_of(address: str) -> str:
    """ "7070" of "host:7070"."""
    return address.rpartition(":")[2]


def _ports(addresses: Iterable[str]) -> tuple[str, ...]:
    distant = [a for a in addresses if not a.startswith("unix:") and not is_loopback(a.rpartition(":")[0])]
    return tuple(dict.fromkeys(port_of(address) for address in distant))
