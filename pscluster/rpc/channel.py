"""Channels that carry the cluster's token, and the file it is read from."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from pscluster import errors
from pscluster.rpc.options import CHANNEL_OPTIONS


def open_channel(address: str, token: str) -> grpc.Channel:
    """A channel to "unix:/path" or "host:port" that sends the token. Never blocks; the caller closes it."""
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.intercept_channel(channel, _Bearer(token))


def open_aio_channel(address: str, token: str) -> grpc.aio.Channel:
    """The same for asyncio. Belongs to the running loop; the caller closes it with `await channel.close()`."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=_aio_bearers(token))


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
    """What grpc's client interceptors may change of a call."""

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
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            details.compression,
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


def _aio_bearers(token: str) -> list[Any]:
    async def send(_self: Any, continuation: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add("authorization", f"Bearer {token}")
        return await continuation(details._replace(metadata=metadata), request)

    bases = {
        "intercept_unary_unary": grpc.aio.UnaryUnaryClientInterceptor,
        "intercept_unary_stream": grpc.aio.UnaryStreamClientInterceptor,
        "intercept_stream_unary": grpc.aio.StreamUnaryClientInterceptor,
        "intercept_stream_stream": grpc.aio.StreamStreamClientInterceptor,
    }
    # One object per kind: grpc.aio sorts interceptors by class and takes only the first that fits.
    return [type("_AioBearer", (base,), {name: send})() for name, base in bases.items()]
