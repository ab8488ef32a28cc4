"""Maps PsError to gRPC status and back, in one place."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from pscluster import errors
from pscluster.errors import PsError

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


def error_of(failure: grpc.RpcError, server: str = "the master") -> PsError:
    """The PsError of a failed call: the one that the server raised, or one that matches the status.

    Accepts errors of grpc and grpc.aio. `server`: whom to name when nobody answered; UNAVAILABLE without a listener is
    an UnreachableError, too.
    """
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
    kind = _KINDS.get(code, errors.InternalError)
    return kind(_cause(code, text, server), details={"grpc_code": code.name})


def status_of(error: PsError) -> Any:
    """A `grpc.Status` (code, details, trailing_metadata) whose rich part carries the whole error.

    Texts are cut at 4 KiB each, so that no error outgrows the limit on metadata.
    """
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
    """The gRPC status code of an error."""
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
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"{server} does not answer: {text}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{server} did not answer in time"
    if code is grpc.StatusCode.CANCELLED:
        return f"the call was cut off: {text}"
    return text if code in _KINDS else f"{code.name}: {text}"
