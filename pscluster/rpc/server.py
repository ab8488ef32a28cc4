"""Server interceptors for grpc.aio: every handler's errors mapped, every call's token checked. Handlers are coroutine
functions or asynchronous generators and raise PsError."""

from __future__ import annotations

import hmac
import inspect
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import structlog

from pscluster import errors
from pscluster.errors import PsError
from pscluster.rpc import code_for, status_of
from pscluster.telemetry import observe_rpc

_HEALTH = "/grpc.health.v1.Health/"
_log = structlog.get_logger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status: PsError as itself, anything else as a logged InternalError. Counts
    every call in the metrics of `pscluster.telemetry`."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_HEALTH):
            return handler
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                streams = kind.endswith("stream")
                guarded = self._stream(details.method, behaviour) if streams else None
                return getattr(grpc, f"{kind}_rpc_method_handler")(
                    guarded or self._unary(details.method, behaviour, timed=kind == "unary_unary"),
                    request_deserializer=handler.request_deserializer,
                    response_serializer=handler.response_serializer,
                )
        return handler

    def _unary(self, method: str, behaviour: Any, timed: bool) -> Any:
        async def guarded(request: Any, context: Any) -> Any:
            async with self._guard(method, context, timed):
                return await behaviour(request, context)

        return guarded

    def _stream(self, method: str, behaviour: Any) -> Any:
        async def guarded(request: Any, context: Any) -> Any:
            async with self._guard(method, context, timed=False):
                answer = behaviour(request, context)
                if inspect.isawaitable(answer):
                    await answer
                else:
                    async for message in answer:
                        yield message

        return guarded

    @asynccontextmanager
    async def _guard(self, method: str, context: Any, timed: bool) -> AsyncIterator[None]:
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
    """Admits only calls with the cluster's token as bearer; gRPC health is open to everyone."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        if details.method.startswith(_HEALTH) or self._admits(details.invocation_metadata):
            return await continuation(details)
        return _REFUSE

    def _admits(self, metadata: Any) -> bool:
        given = [value for key, value in metadata or () if key == "authorization"]
        text = given[-1] if given else ""
        return hmac.compare_digest(text if isinstance(text, bytes) else text.encode(), self._expected)


async def _refuse(_requests: Any, context: Any) -> None:
    await _abort("", errors.AuthError("the call carries no token, or a wrong one"), context)


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
