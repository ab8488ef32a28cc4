"""The address at which other hosts reach this node, and the ports on which its partitions listen.

What is advertised is a literal address, never loopback to another host. Decisions are pure; `NodeAddress.locate` reads
the host's interfaces and routes."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import psutil

from pscluster.address import is_loopback, split_address
from pscluster.errors import SettingsError
from pscluster.reachability import unreachable

AUTO = "auto"
LOOPBACK = "127.0.0.1"
ASK = "name the address at which other hosts reach this one: --advertise ADDRESS, or --interface NAME"
_ELSEWHERE = (("192.0.2.1", 9), ("2001:db8::1", 9))  # documentation addresses: nothing is sent there
Address = IPv4Address | IPv6Address


@dataclass(frozen=True, kw_only=True)
class PortRange:
    """Ports from `first` to `last`, both included. Raises ValueError."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= 65535:
            raise ValueError(f"data_ports {self.first}-{self.last} is not A-B with 1 <= A <= B <= 65535")

    @classmethod
    def parse(cls, text: str) -> PortRange:
        """The range of "7100-7199", or of "7100" alone. Raises ValueError."""
        first, separator, last = text.partition("-")
        if not first.strip().isdecimal() or (separator and not last.strip().isdecimal()):
            raise ValueError(f"data_ports {text!r} is not A-B, such as 7100-7199")
        return cls(first=int(first), last=int(last if separator else first))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """One address of one interface of this host."""

    name: str
    address: Address


def literal(text: str) -> Address:
    """An address without a name server: "10.0.0.5", "fd00::5" or "[fd00::5]". Raises ValueError, also for one that no
    other host can use: link-local, unspecified or multicast."""
    try:
        address = ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError(f"advertise {text!r} is neither {AUTO} nor an IPv4 or IPv6 address") from None
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        raise ValueError(f"advertise {text!r} is no address at which one host can be reached by the others")
    return address


def shown(address: Address) -> str:
    """As it stands before a port: IPv6 in brackets."""
    return f"[{address}]" if address.version == 6 else str(address)


def is_local(master: str) -> bool:
    """Whether a master at this address, "unix:/path" or "host:port", runs on this host for certain."""
    if master.startswith("unix:"):
        return True
    return is_loopback(split_address(master)[0])


def choose_by_interface(wanted: str, present: Sequence[Interface]) -> Address:
    """The address of the interface with this name, or the one within this network ("10.0.0.0/24"); IPv4 before IPv6 on
    one interface. Raises SettingsError, which lists what there is."""
    try:
        network = ipaddress.ip_network(wanted, strict=False) if "/" in wanted else None
    except ValueError:
        raise SettingsError(f"interface {wanted!r} is neither a name nor a network such as 10.0.0.0/24") from None
    usable = [interface for interface in present if _is_usable(interface.address)]
    fitting = [
        interface.address
        for interface in usable
        if (interface.address in network if network is not None else interface.name == wanted)
    ]
    if not fitting:
        there = ", ".join(f"{interface.name} ({interface.address})" for interface in usable) or "none"
        raise SettingsError(
            f"no interface {wanted!r} with an address for other hosts; there are: {there}",
            action="give --interface one of these names, or a network that holds one of these addresses",
        )
    return min(fitting, key=lambda address: address.version)


def choose_automatically(towards: Iterable[Address], present: Sequence[Interface]) -> Address:
    """What `--advertise auto` means. `towards`: local addresses of sockets towards the master, then towards the default
    route; the first that other hosts can use is taken. Without one, that of the only interface; a host that has none at
    all is alone, and loopback reaches whoever is there. Raises SettingsError when there is a choice."""
    for address in towards:
        if _is_usable(address):
            return address
    usable = [interface for interface in present if _is_usable(interface.address)]
    if not usable:
        return ipaddress.ip_address(LOOPBACK)
    if len(usable) > 1:
        there = ", ".join(f"{interface.name} ({interface.address})" for interface in usable)
        raise SettingsError(f"this host has several addresses and no default route: {there}", action=ASK)
    return usable[0].address


def depot_choices(listen: str | None, secured: bool, ports: PortRange | None) -> list[str]:
    """Where a depot tries to listen, in this order. Without certificates on loopback alone; with them at every address
    of the host, which may change, and on the ports that are open to others. Pure. Raises SettingsError for an address
    of another kind that would need certificates."""
    if listen is not None:
        if not secured and not is_local(listen):
            raise SettingsError(
                f"depot_listen {listen} is not on loopback, and this node has no certificate",
                action="join with --join TOKEN, or give --depot-listen 127.0.0.1:PORT",
            )
        return [listen]
    if not secured:
        return [f"{LOOPBACK}:0"]
    return [f"{host}:{port}" for host in ("[::]", "0.0.0.0") for port in (ports or (0,))]


def is_gone(host: str, present: Collection[Interface]) -> bool:
    """Whether an address that this node advertised, as `shown` writes it, is no longer one of its own. Loopback always
    is its own."""
    address = ipaddress.ip_address(host.strip("[]"))
    return not address.is_loopback and all(interface.address != address for interface in present)


def _is_usable(address: Address) -> bool:
    return not (address.is_loopback or address.is_link_local or address.is_unspecified)


@dataclass(frozen=True, kw_only=True)
class NodeAddress:
    """Where this node is reached, by its settings. `master`: "unix:/path" or "host:port". `advertise`: "auto" or an
    address. `interface`: a name or a network; empty: any. Raises ValueError."""

    master: str
    advertise: str = AUTO
    interface: str = ""

    def __post_init__(self) -> None:
        if self.advertise == AUTO:
            return
        if self.interface:
            raise ValueError("advertise and interface cannot both be given: each names the address")
        if literal(self.advertise).is_loopback and not is_local(self.master):
            raise ValueError(f"advertise {self.advertise} is loopback, which other hosts cannot reach")

    def locate(self) -> str:
        """The address that this node advertises now, with brackets around IPv6. Blocks while the master's name is
        resolved. Raises SettingsError when the settings name none, UnreachableError when the network is down."""
        present = interfaces()
        if self.interface:
            return shown(choose_by_interface(self.interface, present))
        if self.advertise == AUTO:
            return shown(choose_automatically(self._towards(), present))
        address = literal(self.advertise)
        if is_gone(shown(address), present):
            raise SettingsError(f"{address} is no address of this host", action=ASK)
        return shown(address)

    def _towards(self) -> list[Address]:
        """Local addresses of sockets towards the master, unless it is surely here, then towards the default route."""
        elsewhere = [address for host, port in _ELSEWHERE for address in _local_addresses(host, port)]
        if is_local(self.master):
            return elsewhere
        try:
            found = _local_addresses(*split_address(self.master))
        except OSError as error:
            raise unreachable(error, "the master", self.master) from None
        if not found:
            no_route = OSError(errno.ENETUNREACH, "this host has no route to it")
            raise unreachable(no_route, "the master", self.master)
        return found + elsewhere


def interfaces() -> list[Interface]:
    """All addresses of this host, one entry each."""
    found = []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                found.append(Interface(name=name, address=ipaddress.ip_address(entry.address.partition("%")[0])))
    return found


def _local_addresses(host: str, port: int) -> list[Address]:
    """From which addresses of this host packets to `host` are sent, one for each of its addresses with a route. Sends
    none. Raises OSError when the name does not resolve."""
    found = []
    for family, kind, _, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(target)
            except OSError:  # no route of this family: the others are tried
                continue
            found.append(ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]))
    return found
