"""Where the master is reached: gRPC on Unix sockets and TCP, and the join endpoint.

With certificates every TCP address is TLS and takes members alone, while Unix sockets take the token: two gRPC servers
with the same services. Without, one server takes the token everywhere, and listens on this machine alone."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil

from pscluster import rpc
from pscluster.address import is_loopback, join_address, split_address
from pscluster.errors import AddressInUseError, SettingsError
from pscluster.rpc.server import (
    CertificateInterceptor,
    ErrorInterceptor,
    Revocations,
    TokenInterceptor,
    server_credentials,
)
from pscluster.security.credentials import CredentialSource
from psmaster.api.join import JoinEndpoint
from psmaster.control.loop import ControlLoop
from psmaster.control.security import Addresses, ClusterSecurity
from psmaster.model.job import Event
from psmaster.model.state import State

STOP_GRACE_S = 0.5  # how long calls in progress may take when the master ends
MAX_ADDRESSES = 8  # that a join token names
_LONGEST_SLEEP_S = 60.0  # between two looks at the clock, which may be set
_UNIX = "unix:"


def check_address(address: str) -> None:
    """Raises ValueError for what is neither "unix:/path" nor a literal "host:port"; an IPv6 host stands in brackets."""
    if address.startswith(_UNIX):
        if len(address) <= len(_UNIX) or len(address) > len(_UNIX) + 107:
            raise ValueError(f"{address!r} is no path that a Unix socket can have (1 to 107 characters)")
        return
    try:
        host, _ = split_address(address)
    except SettingsError:
        raise ValueError(f"{address!r} is neither host:port nor unix:/path") from None
    if ":" in host and not address.startswith("["):
        raise ValueError(f"{address!r}: write an IPv6 host in brackets, [::1]:7070")
    try:
        _ = host == "localhost" or ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{address!r}: {host!r} is not a literal address, nor localhost") from None


def refuse_exposed(listen: tuple[str, ...], state_dir: Path) -> None:
    """Raises SettingsError for an address that other hosts reach: without certificates nothing encrypts the token."""
    for address in listen:
        if not address.startswith(_UNIX) and not is_loopback(split_address(address)[0]):
            raise SettingsError(
                f"{address} is not a loopback address, and this cluster has no certificates",
                action=f"run `psctl certs init --state-dir {state_dir}`; then every TCP address is encrypted",
                details={"listen": address},
            )


class Listening:
    """Bound addresses, which are served from `serve` on. Everything is released with `stack`."""

    def __init__(
        self, stack: AsyncExitStack, core: ControlLoop, token: str, listen: tuple[str, ...], join_listen: str | None
    ) -> None:
        """Raises AddressInUseError."""
        self._stack = stack
        interceptors = [ErrorInterceptor(), TokenInterceptor(token)]
        plain = grpc.aio.server(interceptors=interceptors, options=rpc.SERVER_OPTIONS)
        self._servers, members, tls = [plain], plain, None
        source = CredentialSource(core.security.master_credentials()) if core.security.secured else None
        if source is not None:
            members, tls = _member_server(stack, core), server_credentials(source)
            self._servers.append(members)
            _start(stack, _keep_fresh(core.security, source))
        bound = {address: bind(plain if address.startswith(_UNIX) else members, address, tls) for address in listen}
        for path in [address.removeprefix(_UNIX) for address in listen if address.startswith(_UNIX)]:
            stack.callback(Path(path).unlink, missing_ok=True)
        reached = [(split_address(one)[0], port) for one, port in bound.items() if not one.startswith(_UNIX)]
        self.addresses = Addresses(
            listening=tuple(one if one.startswith(_UNIX) else f"{one.rpartition(':')[0]}:{bound[one]}" for one in bound)
        )
        if source is not None and reached:
            joins = _take_joins(stack, JoinEndpoint(core, source), reached[0], join_listen)
            self.addresses = replace(self.addresses, master=_named(*reached[0])[0], joins=joins)

    async def serve(self, *services: Callable[[grpc.aio.Server], None]) -> None:
        """Answer calls from now on. `services`: each adds one to a server."""
        for server in self._servers:
            for add_to in services:
                add_to(server)
            await server.start()
            self._stack.push_async_callback(server.stop, STOP_GRACE_S)


def _member_server(stack: AsyncExitStack, core: ControlLoop) -> grpc.aio.Server:
    """A server for callers with certificates, none of which is revoked."""
    revocations = Revocations()

    def follow(state: State, _events: tuple[tuple[str, Event], ...]) -> None:
        revocations.replace(state.access.revoked_serials)

    follow(core.state, ())
    core.listeners.append(follow)
    stack.callback(core.listeners.remove, follow)
    interceptors = [ErrorInterceptor(), CertificateInterceptor(core.security.cluster_id, revocations)]
    return grpc.aio.server(interceptors=interceptors, options=rpc.EXPOSED_OPTIONS)


def _take_joins(
    stack: AsyncExitStack, endpoint: JoinEndpoint, members: tuple[str, int], join_listen: str | None
) -> tuple[str, ...]:
    """Open the join endpoint, by default beside the first address at which members are served; where to find it."""
    host, port = split_address(join_listen) if join_listen is not None else (members[0], members[1] + 1)
    stack.push_async_callback(endpoint.close)
    return _named(host, endpoint.listen(host, port))


def _named(host: str, port: int) -> tuple[str, ...]:
    """The addresses at which others find what listens at `host`: all of this machine's for a wildcard, IPv4 first."""
    hosts = [host]
    if host != "localhost" and ipaddress.ip_address(host).is_unspecified:
        hosts = _own_addresses(with_ipv6=":" in host)[:MAX_ADDRESSES]
    return tuple(join_address(one, port) for one in hosts)


def _own_addresses(*, with_ipv6: bool) -> list[str]:
    """This machine's addresses that others may reach; loopback if there are none."""
    families = (socket.AF_INET, socket.AF_INET6) if with_ipv6 else (socket.AF_INET,)
    found = [own for owned in psutil.net_if_addrs().values() for own in owned]
    hosts = [own.address for family in families for own in found if own.family == family and "%" not in own.address]
    return [one for one in hosts if not is_loopback(one)] or ["::1" if with_ipv6 else "127.0.0.1"]


async def _keep_fresh(security: ClusterSecurity, source: CredentialSource) -> None:
    """Replace the master's own certificate before it expires; handshakes use the newest."""
    while True:
        held, now_s = source.get(), time.time()
        await asyncio.sleep(min(_LONGEST_SLEEP_S, max(0.0, held.renew_at_s - now_s)))
        # Also where the clock was ahead when it was made: nobody else would accept it until then.
        if not held.not_before_s <= time.time() < held.renew_at_s:
            source.replace(security.master_credentials())


def _start(stack: AsyncExitStack, work: Any) -> None:
    task = asyncio.create_task(work)
    stack.callback(task.cancel)


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Listen on an address; its port. A Unix socket needs no `credentials`; a file that a killed master left is
    replaced. Raises AddressInUseError when another process serves there."""
    if address.startswith(_UNIX):
        _replace_stale(Path(address.removeprefix(_UNIX)))
        credentials = None
    try:
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise AddressInUseError(f"cannot listen on {address}: it is taken, or not ours", details={}) from error
    if port == 0:
        raise AddressInUseError(f"cannot listen on {address}")
    return port


def _replace_stale(path: Path) -> None:
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise AddressInUseError(f"cannot listen on {path}: {error.strerror}") from None
    raise AddressInUseError(f"{path} is served by another process")
