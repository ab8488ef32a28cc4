"""How the client calls the master and depots: with deadlines, errors mapped, retried in outages."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from pscluster import rpc
from pscluster.client.records import LogLine, SnapshotPart
from pscluster.errors import NotFoundError, PsError, UnreachableError
from pscluster.job.bundle import Bundle
from pscluster.security.identity import Role
from pscluster.storage import Written
from pscluster.storage.directory import Incoming
from pscluster.v1 import depot_pb2, depot_pb2_grpc, jobs_pb2, plan_pb2
from pscluster.wire.backoff import delay_s

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
STREAM_DEADLINE_S = 3600.0
"""A stream is reopened after this long, so that every call has a deadline."""
MAX_DELAY_S = 5.0
OVERLAP_S = 30.0
"""A reopened log stream is read again from this far back: agents send late what they queued during an outage."""
_Key = tuple[str, float, str, str]


def unary(method: Any, request: Any, deadline_s: float = rpc.DEADLINE_S) -> Any:
    """Call a stub's method for one reply. Blocks up to `deadline_s`; raises PsError."""
    try:
        return method(request, timeout=deadline_s)
    except grpc.RpcError as failure:
        raise rpc.error_of(failure) from None


def stream(
    method: Any, request: Any, deadline_s: float = rpc.TRANSFER_DEADLINE_S, *, server: str = "the master"
) -> Iterator[Any]:
    """All replies of a streaming method, within `deadline_s`. Closing the iterator ends the call. Raises PsError, which
    names `server` when nobody answers."""
    call = method(request, timeout=deadline_s)
    try:
        yield from call
    except grpc.RpcError as failure:
        raise rpc.error_of(failure, server) from None
    finally:
        call.cancel()


def upload_messages(bundle: Bundle) -> Iterator[jobs_pb2.UploadBundleRequest]:
    """A bundle as the messages of one upload: its name, then its bytes."""
    header = jobs_pb2.BundleHeader(sha256=bundle.sha256, size_bytes=len(bundle.data))
    yield jobs_pb2.UploadBundleRequest(header=header)
    view = memoryview(bundle.data)
    for start in range(0, len(view), CHUNK_BYTES):
        yield jobs_pb2.UploadBundleRequest(data=bytes(view[start : start + CHUNK_BYTES]))


def fetch(depots: Mapping[str, str], access: rpc.Access, job_id: str, part: SnapshotPart, directory: Path) -> Path:
    """Write the part into `directory`, complete and verified, from any node that has it. `depots`: the nodes'
    addresses. Blocks. Raises NotFoundError when no node delivers it."""
    why = "none of them is connected"
    for address in (depots[node_id] for node_id in part.nodes if depots.get(node_id)):
        try:
            return _fetch(address, access, job_id, part, directory)
        except PsError as error:
            why = str(error)
    raise NotFoundError(
        f"{part.path} of {job_id} is on {', '.join(part.nodes)}: {why}", action="start one of these servers"
    )


def _fetch(address: str, access: rpc.Access, job_id: str, part: SnapshotPart, directory: Path) -> Path:
    wanted = plan_pb2.SnapshotPart(path=part.path, size_bytes=part.size_bytes, checksum=part.checksum)
    incoming = Incoming(directory, part.path)
    try:
        with rpc.open_channel(address, access, Role.SERVER) as channel:
            stub: Any = depot_pb2_grpc.DepotStub(channel)  # type: ignore[no-untyped-call]
            request = depot_pb2.GetPartRequest(job_id=job_id, part=wanted)
            for chunk in stream(stub.GetPart, request, server=f"the depot at {address}"):
                incoming.add(chunk.data)
        incoming.commit(Written(name=part.path, size_bytes=part.size_bytes, checksum=part.checksum))
    finally:
        incoming.abort()
    return directory / part.path


@dataclass(kw_only=True)
class Outage:
    """A master that has not answered since `since_s` (monotonic), after `attempts` retries."""

    since_s: float
    attempts: int = 0

    def next_delay_s(self, now_s: float, max_outage_s: float, draw: float) -> float | None:
        """Count a retry; the seconds to wait before it, growing with jitter; None once the outage has lasted
        `max_outage_s`."""
        left_s = self.since_s + max_outage_s - now_s
        if left_s <= 0:
            return None
        self.attempts += 1
        return min(left_s, delay_s(self.attempts, draw, cap_s=MAX_DELAY_S))


@dataclass(frozen=True, kw_only=True)
class ReconnectingStream:
    """How a stream is kept open. `on_outage(error, seconds)` is called after each failed try, with how long the master
    has not answered; `on_reconnect()` once it answers again. Both run in the caller's thread."""

    max_outage_s: float = 600.0
    on_outage: Callable[[UnreachableError, float], None] = lambda _error, _seconds: None
    on_reconnect: Callable[[], None] = lambda: None
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random

    def follow(
        self,
        open_stream: Callable[[], Iterator[Any]],
        finished: Callable[[], bool],
        expired: Callable[[], bool] = lambda: False,
    ) -> Iterator[Any]:
        """The messages of a stream, reopened whenever it breaks, or ends before `finished()` is true.

        Blocks between messages. A break after `expired()` ends it without an error. Raises UnreachableError once the
        master has not answered for `max_outage_s`, and any other error of the master at once.
        """
        outage: Outage | None = None
        while True:
            try:
                for message in open_stream():
                    if outage is not None:
                        outage = None
                        self.on_reconnect()
                    yield message
                if finished():
                    return
                error = UnreachableError("the master closed the stream")
            except UnreachableError as broken:
                error = broken
            if expired():
                return
            outage = self.wait_retry(outage, error)

    def wait_retry(self, outage: Outage | None, error: UnreachableError) -> Outage:
        """Wait for the next try, or raise `error`. A stream that reached its own deadline is not reported."""
        now_s = self.monotonic()
        outage = outage or Outage(since_s=now_s)
        wait_s = outage.next_delay_s(now_s, self.max_outage_s, self.draw())
        if wait_s is None:
            raise error
        if error.details.get("grpc_code") != "DEADLINE_EXCEEDED":
            self.on_outage(error, now_s - outage.since_s)
        self.sleep(wait_s)
        return outage

    def retry(self, attempt: Callable[[], T]) -> T:
        """The result of an idempotent call, repeated while nobody answers. Blocks; raises as `follow` does."""
        outage: Outage | None = None
        while True:
            try:
                result = attempt()
            except UnreachableError as error:
                outage = self.wait_retry(outage, error)
                continue
            if outage is not None:
                self.on_reconnect()
            return result


@dataclass
class MetricsCursor:
    """Where a reader of a job's metrics is, as the master names it; empty: at their beginning."""

    position: str = ""


class LogCursor:
    """Where a reader of a job's log is, so that a reopened stream repeats no line and loses none: it remembers the
    lines of the last OVERLAP_S seconds (of log time). Bounded."""

    def __init__(self, since_s: float, max_lines: int = 100_000) -> None:
        self._since_s = since_s
        self._newest_s = 0.0
        self._recent: deque[_Key] = deque(maxlen=max_lines)
        self._repeats: Counter[_Key] = Counter()
        self.opened = 0

    def open(self) -> float:
        """Count a stream that is opened; the Unix time from which to request lines."""
        self.opened += 1
        if self.opened > 1:
            self._repeats = Counter(self._recent)
            return max(self._since_s, self._newest_s - OVERLAP_S)
        return self._since_s

    def is_new(self, line: LogLine) -> bool:
        """Whether `line` was not returned before the last `open`."""
        key = (line.source, line.time_s, line.stream, line.text)
        if self._repeats[key] > 0:
            self._repeats[key] -= 1
            return False
        self._newest_s = max(self._newest_s, line.time_s)
        self._recent.append(key)
        while self._recent and self._recent[0][1] < self._newest_s - 2 * OVERLAP_S:
            self._recent.popleft()
        return True
