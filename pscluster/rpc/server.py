"""Server interceptors for grpc.aio: every handler's errors mapped, every call's token or certificate checked. Handlers
are coroutine functions or asynchronous generators and raise PsError."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, NoReturn, cast

import grpc
import structlog

from pscluster import errors
from pscluster.errors import PsError
from pscluster.rpc import code_for, status_of
from pscluster.rpc.access import CALLER, LOCAL, OPEN_SERVICE, Caller, caller_of, expired, require_role, revoked
from pscluster.security.credentials import Credentials, CredentialSource
from pscluster.telemetry import observe_rpc

_log = structlog.get_logger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status: PsError as itself, anything else as a logged InternalError. Counts
    every call in the metrics of `pscluster.telemetry`. It must be the first interceptor of a server."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(OPEN_SERVICE):
            return handler
        return _guarded(handler, partial(self._guard, details.method, handler.unary_unary is not None))

    @asynccontextmanager
    async def _guard(self, method: str, timed: bool, context: Any) -> AsyncIterator[None]:
        started, code = time.monotonic(), grpc.StatusCode.CANCELLED
        try:
            yield
            code = grpc.StatusCode.OK
        except Exception as error:
            code = _code_of(error, context)
            await _abort(method, error, context)
        finally:
            observe_rpc(method, time.monotonic() - started if timed else None, code.name)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Admits only calls with the cluster's token as bearer, as the caller LOCAL; gRPC health is open to everyone. For
    servers that only this machine reaches."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        if details.method.startswith(OPEN_SERVICE):
            return await continuation(details)
        if not self._admits(details.invocation_metadata):
            return _REFUSE
        CALLER.set(LOCAL)  # a call has a task, and so a context, of its own
        return await continuation(details)

    def _admits(self, metadata: Any) -> bool:
        given = [value for key, value in metadata or () if key == "authorization"]
        text = given[-1] if given else ""
        return hmac.compare_digest(text if isinstance(text, bytes) else text.encode(), self._expected)


class CertificateInterceptor(grpc.aio.ServerInterceptor):
    """Admits calls by the caller's certificate, as `pscluster.rpc.access` says; gRPC health is open to every member.
    For servers whose TLS has verified the certificate. A call ends when its certificate expires or is revoked."""

    def __init__(self, cluster_id: str, revocations: Revocations) -> None:
        self._cluster_id = cluster_id
        self._revocations = revocations

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(OPEN_SERVICE):
            return handler
        return _guarded(handler, partial(self._guard, details.method))

    @asynccontextmanager
    async def _guard(self, method: str, context: Any) -> AsyncIterator[None]:
        shown = context.auth_context().get("x509_pem_cert", ())
        if not shown:
            raise errors.AuthError("the call carries no certificate", details={"missing": "certificate"})
        caller = caller_of(shown[0], self._cluster_id)
        require_role(caller, method)
        with self._revocations.watching(caller):
            CALLER.set(caller)
            yield


class Revocations:
    """The certificates that are refused, by serial number, and the calls in progress by the serial of their caller.
    Belongs to one event loop. It holds as many calls as are in progress."""

    def __init__(self) -> None:
        self._serials: frozenset[str] = frozenset()
        self._calls: dict[str, set[_Call]] = {}

    def replace(self, serials: Iterable[str]) -> None:
        """Refuse these from now on, and no others. Calls in progress of such callers end at once with AuthError."""
        fresh = frozenset(serials)
        for serial in fresh - self._serials:
            for call in self._calls.get(serial, ()):
                call.end(revoked(call.caller))
        self._serials = fresh

    @contextmanager
    def watching(self, caller: Caller) -> Iterator[None]:
        """One call of a caller, in the task that serves it. Raises AuthError when the certificate is refused by then,
        or is later."""
        if caller.serial in self._serials:
            raise revoked(caller)
        call, remaining_s = _Call(caller), caller.expires_s - time.time()
        if remaining_s <= 0:
            raise expired(caller)
        timer = asyncio.get_running_loop().call_later(remaining_s, call.end, expired(caller))
        self._calls.setdefault(caller.serial, set()).add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.error is not None and call.task.uncancel() <= 0:
                raise call.error from None
            raise
        finally:
            timer.cancel()
            self._calls[caller.serial].discard(call)
            if not self._calls[caller.serial]:
                del self._calls[caller.serial]


class _Call:
    """One call in progress."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.error: errors.AuthError | None = None
        self.task: asyncio.Task[Any] = cast("asyncio.Task[Any]", asyncio.current_task())

    def end(self, error: errors.AuthError) -> None:
        """Cancel the call; its caller gets `error`. Safe to repeat."""
        if self.error is None:
            self.error = error
            self.task.cancel()


def server_credentials(source: CredentialSource) -> grpc.ServerCredentials:
    """For `add_secure_port`: the newest credentials of `source` for each handshake, and every client must show a
    certificate of their authority."""
    used: Credentials | None = None

    def fetch() -> Any:
        nonlocal used
        newest = source.get()
        if newest is used:
            return None
        used = newest
        pair = (newest.key_pem, newest.certificate_pem)
        return grpc.ssl_server_certificate_configuration([pair], newest.authority_pem)

    return grpc.dynamic_ssl_server_credentials(fetch(), fetch, require_client_authentication=True)


Guard = Callable[[Any], AbstractAsyncContextManager[None]]
"""What surrounds a handler, made from the context of the call."""


def _guarded(handler: Any, guard: Guard) -> Any:
    """The handler, run within `guard`."""
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        behaviour = getattr(handler, kind)
        if behaviour is not None:
            return getattr(grpc, f"{kind}_rpc_method_handler")(
                (_stream if kind.endswith("stream") else _unary)(behaviour, guard),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
    return handler


def _unary(behaviour: Any, guard: Guard) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        async with guard(context):
            return await behaviour(request, context)

    return guarded


def _stream(behaviour: Any, guard: Guard) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        async with guard(context):
            answer = behaviour(request, context)
            if inspect.isawaitable(answer):
                await answer
            else:
                async for message in answer:
                    yield message

    return guarded


async def _refuse(_requests: Any, context: Any) -> None:
    await _abort(
        "", errors.AuthError("the call carries no token, or a wrong one", details={"missing": "token"}), context
    )


# A bidirectional stream, because such a handler replies without waiting for a message of the caller.
_REFUSE: Any = grpc.stream_stream_rpc_method_handler(_refuse)


def _code_of(error: Exception, context: Any) -> grpc.StatusCode:
    if isinstance(error, grpc.aio.AbortError):
        return next(
            (code for code in grpc.StatusCode if context.code() in (code, code.value[0])), grpc.StatusCode.UNKNOWN
        )
    return code_for(error) if isinstance(error, PsError) else grpc.StatusCode.INTERNAL


async def _abort(method: str, error: Exception, context: Any) -> NoReturn:
    """End the call with the status of `error`. Always raises grpc.aio.AbortError."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, PsError):
        _log.error("a handler failed", method=method, exc_info=error)
        error = errors.InternalError(f"{method} failed: {type(error).__name__}: {error}")
    status = status_of(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise error
