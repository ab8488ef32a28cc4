"""How the client calls the master: with a deadline, errors mapped, idempotent calls retried."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from pscluster import rpc
from pscluster.client.reconnecting_stream import Outage
from pscluster.errors import UnreachableError
from pscluster.job.bundle import Bundle
from pscluster.v1 import jobs_pb2

T = TypeVar("T")

CHUNK_BYTES = 1 << 20


def unary(method: Any, request: Any, deadline_s: float = rpc.DEADLINE_S) -> Any:
    """Call a stub's method for one reply. Blocks up to `deadline_s`; raises PsError."""
    try:
        return method(request, timeout=deadline_s)
    except grpc.RpcError as failure:
        raise rpc.error_of(failure) from None


def stream(
    method: Any, request: Any, deadline_s: float = rpc.TRANSFER_DEADLINE_S, *, server: str = "the master"
) -> Iterator[Any]:
    """All replies of a stub's streaming method, within `deadline_s`. Closing the iterator ends the call.

    Raises PsError, which names `server` when nobody answers.
    """
    call = open_stream(method, request, deadline_s)
    try:
        yield from call
    except grpc.RpcError as failure:
        raise rpc.error_of(failure, server) from None
    finally:
        call.cancel()


def open_stream(method: Any, request: Any, deadline_s: float) -> Any:
    """A grpc call: an iterator that raises grpc.RpcError and has `cancel()`."""
    return method(request, timeout=deadline_s)


def upload_messages(bundle: Bundle) -> Iterator[jobs_pb2.UploadBundleRequest]:
    """A bundle as the messages of one upload: its name, then its bytes."""
    header = jobs_pb2.BundleHeader(sha256=bundle.sha256, size_bytes=len(bundle.data))
    yield jobs_pb2.UploadBundleRequest(header=header)
    view = memoryview(bundle.data)
    for start in range(0, len(view), CHUNK_BYTES):
        yield jobs_pb2.UploadBundleRequest(data=bytes(view[start : start + CHUNK_BYTES]))


def retry_unreachable(attempt: Callable[[], T], max_outage_s: float) -> T:
    """Retry an idempotent call while nobody answers, with growing jittered pauses, for `max_outage_s`. Blocks."""
    outage: Outage | None = None
    while True:
        try:
            return attempt()
        except UnreachableError:
            now_s = time.monotonic()
            outage = outage or Outage(since_s=now_s)
            wait_s = outage.next_delay_s(now_s, max_outage_s, random.random())
            if wait_s is None:
                raise
            time.sleep(wait_s)
