"""gRPC between our processes: channels with a member's credentials and our options; errors mapped in one place, both
ways.

Callers pass the grpc error to `error_of` and get the PsError that the handler raised. `pscluster.rpc.server` has the
server's side, for grpc.aio."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from pscluster import errors
from pscluster.errors import PsError
from pscluster.rpc.outage import outage
from pscluster.security.identity import Role, dns_name_of

if TYPE_CHECKING:  # cryptography is imported by those who have credentials
    from pscluster.security.credentials import CredentialSource

_DOMAIN = "pscluster"
_MAX_TEXT = 4096
_DETAILS_KEY = "grpc-status-details-bin"
_CUT_SHORT = "Internal error from Core"
"""grpc.aio's text for a call that the peer ended while a message was in flight. The reason is lost."""

_STATUS: dict[type[PsError], grpc.StatusCode] = {
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.StateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AuthError: grpc.StatusCode.UNAUTHENTICATED,
    errors.TaskError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CallerError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnreachableError: grpc.StatusCode.UNAVAILABLE,
    errors.VersionSkewError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PeerError: grpc.StatusCode.ABORTED,
    errors.StorageError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.WaitTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.LocalError: grpc.StatusCode.INTERNAL,
    PsError: grpc.StatusCode.UNKNOWN,
}
_KINDS: dict[grpc.StatusCode, type[PsError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.UnreachableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.UnreachableError,
    grpc.StatusCode.CANCELLED: errors.UnreachableError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AuthError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.CallerError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.StateError,
    grpc.StatusCode.UNIMPLEMENTED: errors.VersionSkewError,
}

C = TypeVar("C")

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
EXPOSED_OPTIONS: list[tuple[str, Any]] = [
    *SERVER_OPTIONS,
    ("grpc.max_allowed_incoming_connections", 512),  # at a port, with those in their handshake: each has a descriptor
    ("grpc.server_handshake_timeout_ms", 10_000),
]
"""Of servers that strangers reach."""
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


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a process shows who it is. `token`: the cluster's, for Unix sockets, and for loopback in a cluster without
    certificates. `source`: its certificate, for TCP; None in a cluster without certificates."""

    token: str = field(default="", repr=False)
    source: CredentialSource | None = None


def open_channel(address: str, access: Access, server: Role = Role.MASTER) -> grpc.Channel:
    """A channel to "unix:/path" or "host:port". Over TCP with a certificate it is TLS, with the newest credentials of
    `access`, and the other end must be a `server` of the same cluster. Never blocks; the caller closes it."""
    credentials, options = _channel_credentials(address, access, server)
    if credentials is None:
        return _send_token(grpc.insecure_channel(address, options=options), access.token)
    return grpc.secure_channel(address, credentials, options=options)


def open_aio_channel(address: str, access: Access, server: Role = Role.MASTER) -> grpc.aio.Channel:
    """The same for asyncio. Belongs to the running loop; the caller closes it with `await channel.close()`."""
    credentials, options = _channel_credentials(address, access, server)
    if credentials is None:
        return _send_token(grpc.aio.insecure_channel(address, options=options), access.token)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _channel_credentials(
    address: str, access: Access, server: Role
) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, Any]]]:
    if access.source is None or address.startswith("unix:"):
        return None, CHANNEL_OPTIONS
    own = access.source.get()
    credentials = grpc.ssl_channel_credentials(own.authority_pem, own.key_pem, own.certificate_pem)
    return credentials, [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", dns_name_of(server))]


def _send_token(channel: C, token: str) -> C:
    """Make every call on a channel carry the token. Not by an interceptor: grpc.aio runs an intercepted stream in
    additional tasks, and leaves them behind, with errors in the log, when the connection breaks."""
    pair = ("authorization", f"Bearer {token}")

    def with_token(kind: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            return partial(kind(*args, **kwargs), metadata=(pair,))

        return method

    for name in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        setattr(channel, name, with_token(getattr(channel, name)))
    return channel


def read_token(path: Path) -> str:
    """The cluster's token in `path`. Raises AuthError when it is missing, empty, not ASCII, or open to others."""
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


def error_of(failure: grpc.RpcError, server: str = "the master", address: str = "") -> PsError:
    """The PsError of a failed call of grpc or grpc.aio: the one that the server raised, or one that matches the status,
    which is an UnreachableError when nobody answered: its detail "reason" is one of `pscluster.reachability`.
    `server`, `address`: whom to name then, and where."""
    status = _rich_status(failure)
    if status is not None:
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == _DOMAIN:
                return _from_info(info, status.message)
    code: grpc.StatusCode = getattr(failure, "code", lambda: grpc.StatusCode.UNKNOWN)()
    text = getattr(failure, "details", lambda: "")() or "no details"
    if code is grpc.StatusCode.INTERNAL and text == _CUT_SHORT:
        return errors.UnreachableError(f"{server} ended the call", details={"grpc_code": code.name})
    if code is grpc.StatusCode.UNAVAILABLE:
        return outage(text, server, address)
    kind = _KINDS.get(code, errors.InternalError)
    return kind(_cause(code, text, server), details={"grpc_code": code.name})


def status_of(error: PsError) -> Any:
    """A `grpc.Status` whose rich part carries the whole error, texts cut to stay within the limit on metadata."""
    code = code_for(error)
    info = error_details_pb2.ErrorInfo(reason=error.code, domain=_DOMAIN)
    for key, value in [*error.details.items(), ("action", error.action)][-32:]:
        info.metadata[key] = value[:_MAX_TEXT]
    packed = AnyMessage()
    packed.Pack(info)
    number: int = code.value[0]
    rich = status_pb2.Status(code=number, message=error.cause[:_MAX_TEXT], details=[packed])
    return rpc_status.to_status(rich)  # type: ignore[no-untyped-call]


def code_for(error: PsError) -> grpc.StatusCode:
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def _from_info(info: error_details_pb2.ErrorInfo, cause: str) -> PsError:
    details = dict(info.metadata)
    action = details.pop("action", "")
    return errors.from_dict({"code": info.reason, "cause": cause, "action": action, "details": details})


def _rich_status(failure: grpc.RpcError) -> status_pb2.Status | None:
    trailing = getattr(failure, "trailing_metadata", lambda: None)()
    for key, value in trailing or ():
        if key == _DETAILS_KEY:
            return status_pb2.Status.FromString(value)
    return None


def _cause(code: grpc.StatusCode, text: str, server: str) -> str:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{server} did not answer in time"
    if code is grpc.StatusCode.CANCELLED:
        return f"the call was cut off: {text}"
    return text if code in _KINDS else f"{code.name}: {text}"
