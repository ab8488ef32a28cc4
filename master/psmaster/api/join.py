"""The join endpoint: who has a join token and no certificate yet becomes a member here.

gRPC cannot serve clients with and without a certificate at one port, so this is a port of its own:
`pscluster.security.join_protocol` over TLS. `pscluster.security.joining` is the client.

Whoever reaches the port may connect, so connections are bounded in number, in time and in bytes. When there are too
many, the one that has waited longest gives way: a real client is served in milliseconds."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl

import structlog
from prometheus_client import Counter

from pscluster.errors import AddressInUseError, AuthError, InternalError, PsError, VersionSkewError
from pscluster.rpc import PROTOCOL
from pscluster.security.credentials import Credentials, CredentialSource
from pscluster.security.join_protocol import (
    DEADLINE_S,
    MAX_LINE_BYTES,
    JoinAnswer,
    JoinRequest,
    pack_answer,
    unpack_request,
)
from pscluster.security.tls import public_server_context
from psmaster.control.loop import ControlLoop
from psmaster.model.access import role_of_token

MAX_CONNECTIONS = 64
MAX_OF_ONE_HOST = 16
REFUSAL_DELAY_S = 1.0  # before a wrong secret is answered: guesses are slow, and seen in the metrics
_BACKLOG = 128
_ACCEPT_PAUSE_S = 0.1  # after a failed accept: out of descriptors, most likely
JOINS = Counter("ps_joins_total", "Attempts to become a member.", ["result"])
for _result in ("joined", "refused", "broken"):
    JOINS.labels(result=_result)
_log = structlog.get_logger(__name__)


class JoinEndpoint:
    """Belongs to one event loop. `close` ends everything that it started."""

    def __init__(self, core: ControlLoop, source: CredentialSource) -> None:
        self._core = core
        self._source = source
        self._context: tuple[Credentials, ssl.SSLContext] | None = None
        self._connections: dict[asyncio.Task[None], str] = {}  # by task the peer's host; the oldest first
        self._accepting: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None

    def listen(self, host: str, port: int) -> int:
        """Accept connections; the port. Raises AddressInUseError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server(
                (host, port),
                family=family,
                backlog=_BACKLOG,
                dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
            )
        except OSError as error:
            raise AddressInUseError(f"cannot take joins on {host} port {port}: {error.strerror}") from None
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener))
        return int(listener.getsockname()[1])

    async def close(self) -> None:
        """End all connections and free the port. Safe to repeat."""
        tasks = [*self._connections, *([self._accepting] if self._accepting else [])]
        self._accepting = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, address = await loop.sock_accept(listener)
            except OSError as error:
                _log.warning("a connection cannot be accepted", cause=str(error))
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            host = str(address[0])
            if sum(1 for other in self._connections.values() if other == host) >= MAX_OF_ONE_HOST:
                self._end_oldest(host)
            elif len(self._connections) >= MAX_CONNECTIONS:
                self._end_oldest("")
            task = asyncio.create_task(self._serve(peer, host))
            self._connections[task] = host
            task.add_done_callback(lambda done: self._connections.pop(done, None))

    def _end_oldest(self, host: str) -> None:
        """End the oldest connection, of one host or of all."""
        for task, other in self._connections.items():
            if host in ("", other):
                del self._connections[task]
                task.cancel()
                return

    async def _serve(self, peer: socket.socket, host: str) -> None:
        """One connection, to its end."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(DEADLINE_S):
                reader, writer = await self._connect(peer)
                writer.write(pack_answer(await self._answer(await reader.readline(), host)))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, ValueError, asyncio.CancelledError) as error:
            JOINS.labels(result="broken").inc()
            _log.debug("a connection to the join endpoint broke", host=host, cause=repr(error))
        finally:
            if writer is None:
                peer.close()
            else:
                writer.transport.abort()

    async def _connect(self, peer: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Streams over TLS, once the handshake is complete."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, peer, ssl=self._newest_context(), ssl_handshake_timeout=DEADLINE_S
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def _newest_context(self) -> ssl.SSLContext:
        credentials = self._source.get()
        if self._context is None or self._context[0] is not credentials:
            self._context = credentials, public_server_context(credentials)
        return self._context[1]

    async def _answer(self, line: bytes, host: str) -> JoinAnswer | PsError:
        try:
            request = unpack_request(line)
            if request is None:
                return JoinAnswer(authority_pem=self._source.get().authority_pem.decode())
            answer = await self._join(request)
        except PsError as error:
            JOINS.labels(result="refused").inc()
            _log.warning("a join was refused", host=host, code=error.code, cause=error.cause)
            if isinstance(error, AuthError):
                await asyncio.sleep(REFUSAL_DELAY_S)
            return error
        except Exception as error:
            _log.exception("a join failed")
            return InternalError(f"the join failed: {type(error).__name__}")
        JOINS.labels(result="joined").inc()
        _log.info("a member joined", host=host, name=request.name)
        return answer

    async def _join(self, request: JoinRequest) -> JoinAnswer:
        if request.protocol != PROTOCOL:
            name, spoken = request.name[:80], str(request.protocol)[:20]
            raise VersionSkewError(f"{name!r} speaks protocol {spoken}, this master {PROTOCOL}")
        security, digest = self._core.security, hashlib.sha256(request.secret.encode()).hexdigest()
        role = role_of_token(self._core.state.access, digest, self._core.now().unix_s)
        pem, made = security.certify(request.csr_pem.encode(), role, request.name)
        await self._core.ask(lambda tx: tx.join(digest, made))
        return JoinAnswer(authority_pem=self._source.get().authority_pem.decode(), certificate_pem=pem.decode())
