"""The owner of the master's state: applies inputs in transactions, and publishes a transaction once it is durable.

    inputs -> Transaction (pure) -> Archive (disk) -> state, assignments, acknowledgements, replies, watchers

Everything but the disk work runs on the event loop; one thread does that while inputs for the next transaction queue
up. One that cannot be written is dropped: requests fail with the error, agents' messages are applied again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import structlog

from pscluster.errors import PsError, StorageError, UnreachableError
from psmaster.control.agent_stream import AgentStream, assignment_of
from psmaster.control.probe_orders import ProbeOrders
from psmaster.control.security import NO_CERTIFICATES, ClusterSecurity
from psmaster.control.transaction import Transaction
from psmaster.model.job import ErrorInfo, Event, Instant, JobWarning
from psmaster.model.membership import is_current, require_current
from psmaster.model.process import Process
from psmaster.model.state import State, newest_deleted
from psmaster.scheduling.draft import Limits
from psmaster.storage.logs import LogMessage
from psmaster.storage.persistence import Archive, Writes, batch_of

T = TypeVar("T")

TICK_S = 0.25  # at most; a short suspicion makes it shorter
RETRY_S = 1.0
CATCH_UP_S = 0.25  # after a stall, for the newest reports to arrive before older ones lead to decisions
MAX_WAITING = 4096  # pending inputs at which agents' streams are no longer read
MAX_REMEMBERED = 1000  # processes of a node that it may still report on
_MAX_BATCH = 512
_log = structlog.get_logger(__name__)


def clock() -> Instant:
    """Now, on both clocks."""
    return Instant(mono_s=time.monotonic(), unix_s=time.time())


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a transaction. `reply` receives the outcome; `ack` is acknowledged once that is durable."""

    apply: Callable[[Transaction], Any]
    reply: asyncio.Future[Any] | None = None
    ack: tuple[AgentStream, int] | None = None
    log: tuple[str, LogMessage] | None = None


class ControlLoop:
    """Belongs to one event loop. `state` is always the newest durable one and may be read from any thread."""

    def __init__(
        self,
        archive: Archive,
        limits: Limits,
        now: Callable[[], Instant] = clock,
        security: ClusterSecurity = NO_CERTIFICATES,
    ) -> None:
        self.archive = archive
        self.limits = limits
        self.now = now
        self.security = security
        self.state = State()
        self.news = asyncio.Event()
        """Set and replaced with each published transaction: wait on it, then read `state` again."""
        self.probe_orders = ProbeOrders()
        self._streams: dict[str, AgentStream] = {}
        self._assigned: dict[str, dict[str, None]] = {}  # by node its processes of late, the newest last
        self._inputs: deque[Input] = deque()
        self._arrived = asyncio.Event()
        self._accepts = asyncio.Event()  # cleared while too many inputs are pending
        self._accepts.set()
        self._revision = 0
        self._tick_s = min(TICK_S, limits.suspicion_s / 8)
        self._tick_at = 0.0
        self._last_transaction_s = now().mono_s
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self.listeners: list[Callable[[State, tuple[tuple[str, Event], ...]], None]] = []
        """Called with each published state and its new events. They must not block."""

    async def load(self) -> None:
        """Read what is stored. Raises StorageError; DamagedError for what is older than its snapshots."""
        loop = asyncio.get_running_loop()
        self.archive.publisher.report_error = lambda *what: _from_thread(loop, self._publish_failed, *what)
        self.archive.publisher.report_removed = lambda job_id: _from_thread(loop, self._removed, job_id)
        self.state = await self.on_disk(self.archive.load, self.now())
        self._last_transaction_s = self.now().mono_s
        # Above every revision that an earlier process of this master has sent.
        self._revision = int(self.now().unix_s * 1000)

    async def run(self) -> None:
        """Commit transactions for ever. Raises only on a bug."""
        while True:
            # Not wait_for: that of Python 3.11 loses a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s):
                    await self._arrived.wait()
            self._arrived.clear()
            if self._stalled_s(self.now()):
                await asyncio.sleep(CATCH_UP_S)
            batch = [self._inputs.popleft() for _ in range(min(len(self._inputs), _MAX_BATCH))]
            if self._inputs:
                self._arrived.set()
            if not await self._commit(batch):
                await asyncio.sleep(RETRY_S)
            if len(self._inputs) < MAX_WAITING:
                self._accepts.set()

    def close_streams(self) -> None:
        """End every agent's stream; the agents reconnect. Safe to repeat."""
        for stream in self._streams.values():
            stream.close()

    async def close(self) -> None:
        """Close the store and refuse pending requests. Call it once `run` was cancelled."""
        self.close_streams()
        self._refuse(list(self._inputs), UnreachableError("the master is ending", action="ask again in a moment"))
        self._inputs.clear()
        await self.on_disk(self.archive.close)
        self._disk.shutdown()

    async def on_disk(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work in the one thread that the archive belongs to."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *arguments)

    async def ask(self, apply: Callable[[Transaction], T]) -> T:
        """Apply an input in the next transaction; its result, once that is durable. Raises what it raises."""
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put(Input(apply=apply, reply=reply))
        return await reply

    async def submit(self, stream: AgentStream, sequence: int, apply: Callable[[Transaction], Any]) -> None:
        """Queue an agent's message; it is acknowledged once durable (0: never). Waits while too many are pending."""
        await self._accepts.wait()
        self._put(Input(apply=apply, ack=(stream, sequence) if sequence else None))

    async def write_log(self, stream: AgentStream, sequence: int, job_id: str, message: LogMessage) -> None:
        """Queue lines of output for a job's log; acknowledged once written. Waits like `submit`."""
        await self._accepts.wait()
        self._put(Input(apply=lambda _: None, ack=(stream, sequence), log=(job_id, message)))

    def _put(self, item: Input) -> None:
        self._inputs.append(item)
        if len(self._inputs) >= MAX_WAITING:
            self._accepts.clear()
        self._arrived.set()

    async def _commit(self, batch: list[Input]) -> bool:
        """Apply a batch in one transaction and publish it. False when it could not be made durable."""
        now = self.now()
        transaction = Transaction(self.state, now, self.limits)
        if stalled_s := self._stalled_s(now):
            transaction.event_loop_stalled(stalled_s)
        if now.mono_s >= self._tick_at:
            self._tick_at = now.mono_s + self._tick_s
            transaction.tick()
        outcomes = [_outcome(item, transaction) for item in batch]
        changes = transaction.finish()
        writes = Writes(
            before=self.state,
            batch=batch_of(self.state, changes),
            changes=changes,
            logs=tuple(item.log for item in batch if item.log and item.log[0] in self.state.jobs),
        )
        if not writes.empty:
            try:
                await self.on_disk(self.archive.save, writes)
            except StorageError as error:
                self._postpone(batch, error)
                return False
        self.state = changes.state
        self._last_transaction_s = now.mono_s
        self._publish(changes.events)
        for item, outcome in zip(batch, outcomes, strict=True):
            _answer(item, outcome)
        return True

    def _stalled_s(self, now: Instant) -> float:
        """How long this loop has committed nothing; 0 when that is too short to matter."""
        stalled_s = now.mono_s - self._last_transaction_s
        return stalled_s if stalled_s > self.limits.suspicion_s / 4 else 0.0

    def _postpone(self, batch: list[Input], error: StorageError) -> None:
        """Drop the transaction: requests fail with the error, agents' messages go back to the queue."""
        _log.error("cannot write; agents' messages wait", code=error.code, cause=error.cause)
        self._refuse(batch, error)
        self._inputs.extendleft(item for item in reversed(batch) if item.reply is None)

    def _refuse(self, batch: list[Input], error: PsError) -> None:
        for item in batch:
            if item.reply is not None and not item.reply.done():
                item.reply.set_exception(error)

    def _publish(self, events: tuple[tuple[str, Event], ...]) -> None:
        for job_id, event in events:
            log = _log.warning if event.warning else _log.info
            log("job event", job=job_id, reason=event.reason, message=event.message)
        deleted = newest_deleted(self.state.deletions)
        jobs = self.state.jobs.values() if self.security.secured else ()
        self.security.keep_processes({own.process_id(job.job_id) for job in jobs for own in job.placements})
        for stream in self._streams.values():
            self._assign(stream, deleted)
        self._assigned = {k: known for k, known in self._assigned.items() if k in self.state.nodes}
        for listener in self.listeners:
            listener(self.state, events)
        self.news.set()
        self.news = asyncio.Event()

    # agents' streams

    async def open_stream(self, node_id: str, incarnation: str, processes: tuple[Process, ...]) -> AgentStream:
        """Open a node's stream and close the former one. Raises StateError for an unregistered incarnation."""
        require_current(self.state.nodes, node_id, incarnation)
        stream = AgentStream(node_id, incarnation)
        former = self._streams.pop(node_id, None)
        self._streams[node_id] = stream
        if former is not None:
            former.close()
        try:
            await self.ask(lambda tx: tx.open_stream(node_id, incarnation, processes))
        except BaseException:
            self.close_stream(stream)
            raise
        return stream

    def stream_of(self, node_id: str) -> AgentStream | None:
        """The node's open stream."""
        return self._streams.get(node_id)

    def close_stream(self, stream: AgentStream) -> None:
        """A stream broke or ended. Does nothing for one that a newer stream replaced. Safe to repeat."""
        stream.close()
        if self._streams.get(stream.node_id) is stream:
            del self._streams[stream.node_id]
            self._put(Input(apply=lambda tx: tx.detach(stream.node_id, stream.incarnation)))

    def _assign(self, stream: AgentStream, all_deleted: tuple[str, ...]) -> None:
        """Send the node its assignment if that has changed; nothing before its Hello was applied."""
        if stream.node_id not in self.state.nodes:
            stream.close()  # its certificate was revoked; an agent that may come back registers again
        if not is_current(self.state.nodes, stream.node_id, stream.incarnation):
            return
        if not self.state.nodes[stream.node_id].connected:
            return
        assignment = assignment_of(self.state, stream.node_id, all_deleted, self.security, self.now().unix_s)
        if stream.assigned != assignment.names():
            self._revision += 1
            stream.assign(replace(assignment, revision=self._revision))
            known = self._assigned.setdefault(stream.node_id, {})
            known |= {process.process_id: None for process in assignment.processes}
            for process_id in list(known)[:-MAX_REMEMBERED]:
                del known[process_id]

    def was_assigned(self, node_id: str, process_id: str) -> bool:
        """Whether a process was assigned to a node since this master started; the newest ones of a node count."""
        return process_id in self._assigned.get(node_id, ())

    def _publish_failed(self, job_id: str, step: int, error: PsError) -> None:
        """A complete snapshot's manifest could not be written: warn, and continue training."""
        _log.warning("a job's store cannot be brought up to date", job=job_id, code=error.code, cause=error.cause)
        warning = JobWarning(step=step, error=ErrorInfo.of(error))
        self._put(Input(apply=lambda tx: tx.warned(job_id, warning, "psmaster")))

    def _removed(self, job_id: str) -> None:
        """Nothing is left in a deleted job's store: no later master has to try again."""
        self._put(Input(apply=lambda tx: tx.removed(job_id)))


def _from_thread(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and the master with it
        loop.call_soon_threadsafe(call, *arguments)


def _outcome(item: Input, transaction: Transaction) -> Any:
    try:
        return item.apply(transaction)
    except PsError as error:
        if item.reply is None:
            _log.error("an agent's message was refused", code=error.code, cause=error.cause)
        return error


def _answer(item: Input, outcome: Any) -> None:
    if item.ack is not None:
        item.ack[0].acknowledge(item.ack[1])
    if item.reply is None or item.reply.done():
        return
    if isinstance(outcome, PsError):
        item.reply.set_exception(outcome)
    else:
        item.reply.set_result(outcome)
