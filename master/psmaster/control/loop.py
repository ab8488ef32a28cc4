"""The one owner of the master's state: takes what comes in, turn by turn, and lets nothing follow before it is durable.

    inputs -> Turn (pure) -> Archive (disk) -> state, assignments, acknowledgements, replies, watchers

Everything but the disk work runs on the event loop; the disk work of one turn is done in one thread while inputs for
the next gather. A turn that cannot be written has not happened: people are told, agents' messages wait and are tried
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from pscluster.errors import PsError, StateError, StorageError, UnreachableError
from psmaster.api import to_proto
from psmaster.control.agent_stream import AgentStream
from psmaster.control.transaction import Transaction
from psmaster.model import deletions
from psmaster.model.job import ErrorInfo, Event, Instant, Job, JobWarning
from psmaster.model.process import Process
from psmaster.model.state import State
from psmaster.scheduling.draft import Limits
from psmaster.scheduling.reconcile import desired
from psmaster.storage.logs import LogMessage
from psmaster.storage.persistence import Archive, Writes, batch_of

T = TypeVar("T")

TICK_S = 0.25  # at most; a short suspicion makes it shorter
RETRY_S = 1.0
CATCH_UP_S = 0.25
"""How long a master that did not listen for a while only listens first: agents may have said one thing of a process and
then another, and the last word counts."""
MAX_WAITING = 4096  # inputs that may wait before agents' streams are no longer read
_MAX_BATCH = 512
_log = structlog.get_logger(__name__)


def clock() -> Instant:
    """Now, on both clocks."""
    return Instant(mono_s=time.monotonic(), unix_s=time.time())


@dataclass(frozen=True, kw_only=True)
class Input:
    """One thing for a turn to take in. With `reply`, somebody waits for the outcome; with `ack`, an agent waits for it
    to be stored."""

    apply: Callable[[Transaction], Any]
    reply: asyncio.Future[Any] | None = None
    ack: tuple[AgentStream, int] | None = None
    log: tuple[str, LogMessage] | None = None


class Core:
    """Belongs to one event loop. `state` is always the newest durable one and may be read from any thread."""

    def __init__(self, archive: Archive, limits: Limits, now: Callable[[], Instant] = clock) -> None:
        self.archive = archive
        self.limits = limits
        self.now = now
        self.state = State()
        self.news = asyncio.Event()
        """Set and replaced whenever something was published: wait on it, then look again."""
        self._streams: dict[str, AgentStream] = {}
        self._inputs: deque[Input] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._revision = 0
        self._tick_s = min(TICK_S, limits.suspicion_s / 8)
        self._tick_at = 0.0
        self._listened_s = now().mono_s
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self.listeners: list[Callable[[State, tuple[tuple[str, Event], ...]], None]] = []
        """Called with each published state and its new events; must not block."""

    async def load(self) -> None:
        """Read what is stored. Raises StorageError; DamagedError for what is older than its snapshots."""
        loop = asyncio.get_running_loop()
        self.archive.publisher.tell = lambda *told: _from_thread(loop, self._unpublished, *told)
        self.archive.publisher.removed = lambda job_id: _from_thread(loop, self._removed, job_id)
        self.state = await self.on_disk(self.archive.load, self.now())
        self._listened_s = self.now().mono_s
        # Above every revision that an earlier life of this master has sent.
        self._revision = int(self.now().unix_s * 1000)

    async def run(self) -> None:
        """Take turns for ever. Raises only what is a bug."""
        while True:
            # Not wait_for: that of Python 3.11 loses a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s):
                    await self._arrived.wait()
            self._arrived.clear()
            if self._deaf_s(self.now()):
                await asyncio.sleep(CATCH_UP_S)
            batch = [self._inputs.popleft() for _ in range(min(len(self._inputs), _MAX_BATCH))]
            if self._inputs:
                self._arrived.set()
            if not await self._turn(batch):
                await asyncio.sleep(RETRY_S)
            if len(self._inputs) < MAX_WAITING:
                self._room.set()

    def hang_up(self) -> None:
        """End every agent's stream; agents come back to the next master. Safe to repeat."""
        for stream in self._streams.values():
            stream.close()

    async def close(self) -> None:
        """Close the store; what waits is refused. Call it once `run` was cancelled."""
        self.hang_up()
        self._refuse(list(self._inputs), UnreachableError("the master is ending", action="ask again in a moment"))
        self._inputs.clear()
        await self.on_disk(self.archive.close)
        self._disk.shutdown()

    async def on_disk(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work in the one thread that the archive belongs to."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *arguments)

    async def ask(self, apply: Callable[[Transaction], T]) -> T:
        """Have `apply` take part in the next turn; its result, once that is durable. Raises what it raises."""
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put(Input(apply=apply, reply=reply))
        return await reply

    async def tell(self, stream: AgentStream, sequence: int, apply: Callable[[Transaction], Any]) -> None:
        """Take in an agent's message; it is acknowledged once stored (`sequence` 0: never). Waits while there is
        too much to do."""
        await self._room.wait()
        self._put(Input(apply=apply, ack=(stream, sequence) if sequence else None))

    async def write_log(self, stream: AgentStream, sequence: int, job_id: str, message: LogMessage) -> None:
        """Take in lines of output for a job's log; acknowledged once written."""
        await self._room.wait()
        self._put(Input(apply=_nothing, ack=(stream, sequence), log=(job_id, message)))

    def _put(self, item: Input) -> None:
        self._inputs.append(item)
        if len(self._inputs) >= MAX_WAITING:
            self._room.clear()
        self._arrived.set()

    async def _turn(self, batch: list[Input]) -> bool:
        """One turn. False when it could not be made durable."""
        now = self.now()
        turn = Transaction(self.state, now, self.limits)
        if deaf_s := self._deaf_s(now):
            turn.event_loop_stalled(deaf_s)
        if now.mono_s >= self._tick_at:
            self._tick_at = now.mono_s + self._tick_s
            turn.tick()
        outcomes = [_outcome(item, turn) for item in batch]
        changes = turn.finish()
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
        self._listened_s = now.mono_s
        self._publish(changes.events)
        for item, outcome in zip(batch, outcomes, strict=True):
            _answer(item, outcome)
        return True

    def _deaf_s(self, now: Instant) -> float:
        """For how long nobody listened; 0 when that is too short to matter."""
        deaf_s = now.mono_s - self._listened_s
        return deaf_s if deaf_s > self.limits.suspicion_s / 4 else 0.0

    def _postpone(self, batch: list[Input], error: StorageError) -> None:
        """Nothing of the turn counts: people hear the error, what agents said is tried again."""
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
        deleted = deletions.named(self.state.deletions)
        for stream in self._streams.values():
            self._assign(stream, deleted)
        for listener in self.listeners:
            listener(self.state, events)
        self.news.set()
        self.news = asyncio.Event()

    # agents' streams

    async def attend(self, node_id: str, incarnation: str, processes: tuple[Process, ...]) -> AgentStream:
        """Open a node's stream; the former one is closed. Raises StateError for a life that is not registered."""
        held = self.state.nodes.get(node_id)
        if held is None or held.incarnation != incarnation:
            raise StateError(f"node {node_id} is not registered in this incarnation", action="register first")
        stream = AgentStream(node_id, incarnation)
        former = self._streams.pop(node_id, None)
        self._streams[node_id] = stream
        if former is not None:
            former.close()
        try:
            await self.ask(lambda turn: turn.attend(node_id, incarnation, processes))
        except BaseException:
            self.leave(stream)
            raise
        return stream

    def leave(self, stream: AgentStream) -> None:
        """A stream broke or ended. Of one that a newer stream replaced, it changes nothing. Safe to repeat."""
        stream.close()
        if self._streams.get(stream.node_id) is stream:
            del self._streams[stream.node_id]
            self._put(Input(apply=lambda turn: turn.detach(stream.node_id, stream.incarnation)))

    def _assign(self, stream: AgentStream, all_deleted: tuple[str, ...]) -> None:
        """Send the node what it is to run, if that has changed; nothing before its Hello was taken in."""
        node = self.state.nodes.get(stream.node_id)
        if node is None or node.incarnation != stream.incarnation or not node.attended:
            return
        wanted = tuple(
            (job, process)
            for job in self.state.jobs.values()
            for process in desired(job)
            if process.placement.node_id == stream.node_id
        )
        nodes = self.state.nodes.values() if node.depot_address else ()
        depots = tuple(sorted((other.node_id, other.depot_address) for other in nodes if other.depot_address))
        deleted = all_deleted if node.depot_address else ()
        named = (depots, deleted, *((process.process_id, process.plan) for _, process in wanted))
        if stream.sent != named:
            stream.sent = named
            self._revision += 1
            stream.assign(to_proto.assignment(wanted, depots, deleted, self._revision))

    def _unpublished(self, job_id: str, step: int, error: PsError) -> None:
        """A complete snapshot's manifest could not be written: training goes on, and people are told."""
        _log.warning("a job's store cannot be brought up to date", job=job_id, code=error.code, cause=error.cause)
        problem = ErrorInfo(code=error.code, cause=error.cause, action=error.action)
        self._put(Input(apply=lambda turn: turn.troubled(job_id, JobWarning(step=step, problem=problem), "psmaster")))

    def _removed(self, job_id: str) -> None:
        """Nothing is left in a deleted job's store: no later master need try again."""
        self._put(Input(apply=lambda turn: turn.removed(job_id)))

    def job(self, job_id: str) -> Job | None:
        """The job as it is now."""
        return self.state.jobs.get(job_id)


def _from_thread(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and the master with it
        loop.call_soon_threadsafe(call, *arguments)


def _nothing(_turn: Transaction) -> None:
    """A log line changes no state."""


def _outcome(item: Input, turn: Transaction) -> Any:
    try:
        return item.apply(turn)
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
