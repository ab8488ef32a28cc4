"""Channels with the cluster's token and our options, and the numbers that both ends of a call agree on."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from pscluster import errors

PROTOCOL = 1
"""Number of the control and data protocol; two processes work together only if theirs are equal."""
DEADLINE_S = 10.0
"""For a call that reads or changes a record."""
TRANSFER_DEADLINE_S = 300.0
"""For a call that moves a bundle."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_SIZES: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 64 * 1024),
    ("grpc.absolute_max_metadata_size", 128 * 1024),
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_SIZES,
    ("grpc.so_reuseport", 0),  # else two masters could share a port unnoticed
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    *_SIZES,
    ("grpc.enable_http_proxy", 0),  # never use a proxy from the environment
    ("grpc.use_local_subchannel_pool", 1),  # a new channel does not inherit the backoff of an old one
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # in fact the longest duration of an attempt: distant hosts need it
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


def open_channel(address: str, token: str) -> grpc.Channel:
    """A channel to "unix:/path" or "host:port" that sends the token. Never blocks; the caller closes it."""
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.intercept_channel(channel, _Bearer(token))


def open_aio_channel(address: str, token: str) -> grpc.aio.Channel:
    """The same for asyncio. Belongs to the running loop; the caller closes it with `await channel.close()`."""
    return _AioBearer(grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS), token)


def read_token(path: Path) -> str:
    """The cluster's token in `path`.

    Raises AuthError when the file is missing, empty, not ASCII, or open to group or others.
    """
    try:
        mode = path.stat().st_mode
        token = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise errors.AuthError(f"no token file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise errors.AuthError(f"cannot read the token file {path}: {error}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise errors.AuthError(f"others may read the token file {path}", action=f"chmod 600 {path}")
    if not token:
        raise errors.AuthError(f"the token file {path} is empty")
    return token


class _CallDetails(NamedTuple):
    """What a grpc client interceptor may change of a call."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any = None


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, token: str) -> None:
        self._pair = ("authorization", f"Bearer {token}")

    def _send(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._pair]
        changed = _CallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready, details.compression
        )
        return continuation(changed, request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._send(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._send(continuation, client_call_details, request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._send(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._send(continuation, client_call_details, request_iterator)


class _AioBearer(grpc.aio.Channel):
    """A channel whose every call carries the token.

    Not an interceptor: grpc.aio runs an intercepted stream in additional tasks, and leaves them behind, with errors in
    the log, when the connection breaks.
    """

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._pair = ("authorization", f"Bearer {token}")

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.unary_unary(method, *args, **kwargs))

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.unary_stream(method, *args, **kwargs))

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.stream_unary(method, *args, **kwargs))

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.stream_stream(method, *args, **kwargs))

    def _with_token(self, start: Any) -> Any:
        def call(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            return start(*args, metadata=grpc.aio.Metadata(*(metadata or ()), self._pair), **kwargs)

        return call

    async def __aenter__(self) -> _AioBearer:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        await self._channel.__aexit__(kind, error, traceback)

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()
