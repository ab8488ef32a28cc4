"""A partition's line to its standby: its state once, then the sums of each step and the decision on it.

    HELLO -> WELCOME: what the standby holds -> SYNC, PIECEs (or what it missed, when it only was away) -> HELD
    each step: PUSH of every bucket's root and of the summary's, as they are complete -> HELD; then DECISION

The sums are sent while backward still fills other buckets, from the memory that they were added in. What waits for the
standby, and when the two are in sync, is decided in `bond`.
"""

from __future__ import annotations

import time
from typing import Protocol

from pscluster.errors import PsError
from pscluster.job.spec import JobSpec
from pscluster.step.codec import BufferNode, as_bytes
from pscluster.step.layout import WORD_BYTES
from pscluster.v1.plan_pb2 import Plan, ProcessReport, StandbyState
from pscluster.wire.connection import Connection
from pscluster.wire.dialer import ReconnectingConnection
from pscluster.wire.frame import SUMMARY, UNCHANGED, Codec, FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Sync
from pscluster.wire.protocol import Channel, Hello, StandbyWelcome, pack_weight
from pscluster.wire.reactor import Reactor
from psserver.partition.replication import in_sync as bond
from psserver.partition.replication.in_sync import InSyncState
from psserver.partition.replication.metadata import ReplicatedMetadata
from psserver.partition.step.commit import Member
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters

PATIENCE_S = 5.0  # in which a standby that votes wait for must do something
QUEUE_BYTES = 64 << 20  # of sums on their way to a standby that is not in sync, or those of two steps if that is more
_RETRY_S = (0.05, 1.0)
_WATCH_S = 0.5


class Primary(Protocol):
    """What the replication asks of its partition. Everything on the partition's thread."""

    index: int
    spec: JobSpec
    plan: Plan | None
    counters: PartitionCounters
    state: PartitionState | None
    step: OpenStep | None
    member: Member
    version: int
    notes: ReplicatedMetadata

    @property
    def is_updating(self) -> bool:
        """Whether a decision is being carried out: the state is of no step."""

    def header(self, **fields: object) -> Header:
        """A header of this job, generation and sender."""

    def make_hello(self, channel: Channel) -> tuple[Header, Hello]:
        """The HELLO to open a connection with."""

    def report(self, report: ProcessReport) -> None:
        """Tell the master."""

    def report_steps(self) -> None:
        """Tell the master of every step that it has not heard of."""

    def try_vote(self) -> None:
        """The standby no longer keeps the step from being voted on."""


class Replication:
    """For whatever standby the plan names. On the partition's thread; never blocks."""

    def __init__(self, reactor: Reactor, primary: Primary) -> None:
        self.bond = InSyncState()
        self._reactor = reactor
        self._primary = primary
        kinds = frozenset({FrameKind.ACK, FrameKind.HELD})
        self._line = ReconnectingConnection(
            reactor, self, self._make_hello, channel="replica", kinds=kinds,
            transport=primary.spec.network.transport, retry_s=_RETRY_S,
        )  # fmt: skip
        self._streams = False  # the standby was sent a state, or has one: steps follow
        self._sent: set[int] = set()  # buckets of the open step that were sent over this connection
        self._queued_bytes = 0  # of sums
        self._is_watching = False
        self._heard = 0
        self._mark: object = None
        self._quiet_since_s = 0.0
        self._gave_up = False

    # ---- plans and the step's cycle ----

    def adopt(self, plan: Plan, *, restored: bool) -> None:
        """A plan names who stands by."""
        placement = plan.partitions[self._primary.index]
        attempt = placement.standby.attempt if placement.HasField("standby") else 0
        addresses = list(placement.standby.addresses)
        before, self.bond = self.bond, bond.adopt(self.bond, attempt, restored=restored)
        if self.bond is before and addresses == self._line.addresses:
            return
        self._forget_connection()
        self._line.follow(addresses)
        self._gave_up = False
        if addresses:
            self._watch_soon()

    def close(self) -> None:
        """Hang up; only another plan has it dial again."""
        self._forget_connection()
        self._line.close()

    def may_vote(self) -> bool:
        """Whether the complete step may be voted on; `Primary.try_vote` is called when that has changed."""
        if not bond.may_vote(self.bond, self._primary.member.step):
            return False
        return self.bond.is_bound or self._queued_bytes <= self._limit_bytes()

    def offer(self) -> None:
        """Send what of the open step is complete and was not sent."""
        step = self._primary.step
        if not self._streams or step is None:
            return
        for bucket in step.complete_buckets():
            if bucket not in self._sent:
                self._sent.add(bucket)
                self._send_root(step, bucket)
            if not self._streams:
                return  # it broke within the send: the rest goes over the next connection, and is not sent till then

    def decided(self, decision: CommitDecision) -> None:
        """A decision is about to be carried out: the sums will be overwritten."""
        if self._line.connection is not None and self._streams:
            self._line.connection.detach(("step", decision.step))
            self._send_decision(decision)
        self._sent.clear()

    def at_boundary(self) -> None:
        """The state is that of a step: a standby that waits for it gets it."""
        primary, state, connection = self._primary, self._primary.state, self._line.connection
        if connection is None or self._streams or state is None or not state.is_filled or primary.is_updating:
            return
        self._stream()
        sync = Sync(
            update_counts=state.update_counts,
            decision=primary.member.last_decision,
            metadata=primary.notes.to_wire(),
        )
        connection.send(primary.header(kind=FrameKind.SYNC, step=primary.member.step), [sync.pack()])
        with primary.counters.phase("snapshot"):
            pieces = state.pieces()
        for (bucket, what), data in pieces.items():
            number = 0 if what == "values" else 1 + int(what.removeprefix("moment"))
            self._send(
                primary.header(kind=FrameKind.PIECE, step=primary.member.step, bucket=bucket, flags=number), data
            )
        self.offer()

    def note(self) -> None:
        """The coordinator's notes have changed."""
        if self._line.connection is not None and self._streams:
            header = self._primary.header(kind=FrameKind.METADATA, step=self._primary.member.step)
            self._line.connection.send(header, [self._primary.notes.to_wire().pack()])

    @property
    def lag_steps(self) -> int | None:
        """How many committed steps the standby could not make; None: it holds nothing."""
        return max(0, self._primary.version - self.bond.reach) if self.bond.reach >= 0 else None

    # ---- sending ----

    def _send_root(self, step: OpenStep, bucket: int) -> None:
        at, header = self._primary.member.step, self._primary.header
        if bucket == SUMMARY:
            body: bytes | memoryview = step.summary.root.pack()
            self._send(header(kind=FrameKind.PUSH, step=at, bucket=bucket, node=step.summary.tree.root), body)
            return
        sums = step.sums(bucket)
        root, node = sums.root, sums.tree.root
        if isinstance(root, BufferNode) and root.words is None:
            body = pack_weight(root.weight)
            self._send(header(kind=FrameKind.PUSH, step=at, bucket=bucket, node=node, flags=UNCHANGED), body)
            return
        words = root.words if isinstance(root, BufferNode) else root
        assert words is not None
        codec = Codec.of(self._primary.spec.network.push_codec) if bucket in step.trained else Codec.FP32
        body = as_bytes(words)
        self._queued_bytes += body.nbytes
        self._send(
            header(kind=FrameKind.PUSH, step=at, bucket=bucket, node=node, codec=codec),
            body,
            at_step=at,
            counts=body.nbytes,
        )

    def _send(
        self, header: Header, body: bytes | bytearray | memoryview, *, at_step: int | None = None, counts: int = 0
    ) -> None:
        connection = self._line.connection
        if connection is None:
            return
        self._primary.counters.replicated_bytes += memoryview(body).nbytes
        sent = (lambda: self._left(connection, counts)) if counts else None
        connection.send(header, [body], tag=None if at_step is None else ("step", at_step), on_sent=sent)

    def _left(self, connection: Connection, size_bytes: int) -> None:
        """Sums of that size are in the kernel's hands."""
        if connection is self._line.connection:
            held_back = self._queued_bytes > self._limit_bytes()
            self._queued_bytes -= size_bytes
            if held_back and self._queued_bytes <= self._limit_bytes():
                self._reactor.post(self._primary.try_vote)

    def _send_decision(self, decision: CommitDecision) -> None:
        header = self._primary.header(kind=FrameKind.DECISION, step=decision.step)
        self._send(header, decision.pack())

    def _limit_bytes(self) -> int:
        state = self._primary.state
        step_bytes = sum(span.num_words for span in state.spans) * WORD_BYTES if state else 0
        return max(QUEUE_BYTES, 2 * step_bytes)

    # ---- what the line hears ----

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - Listener's signature
        self._heard += 1
        self._begin(StandbyWelcome.unpack(body))

    def frame(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - Listener's signature
        self._heard += 1
        if header.kind is FrameKind.HELD:
            self._held(header.step)

    def lost(self, error: PsError | None) -> None:
        """Maybe within a send, whose caller relies on the open step: a vote, and what follows from it, comes later."""
        if error is not None:
            self._primary.counters.refused(error)
        self._forget_connection()
        self._reactor.post(self._primary.try_vote)  # a queue that was too long is no more

    def _stream(self) -> None:
        """Steps follow from here on; of the open one nothing went over this connection yet."""
        self._streams = True
        self._sent.clear()

    def _forget_connection(self) -> None:
        self._streams, self._queued_bytes = False, 0

    def _make_hello(self, _connection: Connection) -> tuple[Header, Hello]:
        return self._primary.make_hello("replica")

    def _begin(self, welcome: StandbyWelcome) -> None:
        """The standby says what it holds: go on from there, or give it the whole state."""
        reach, applied = welcome.reach, welcome.applied
        member = self._primary.member
        if bond.resumes(self.bond, reach, applied, member.step):
            self._stream()
            if applied < member.step and member.last_decision is not None:
                self._send_decision(member.last_decision)
            self.note()  # it may have changed while nobody heard; before the sums: who holds those knows of it
            self._held(reach)
            self.offer()
        elif (anew := bond.begin(self.bond)) is not None:
            self.bond = anew
            self.at_boundary()
            self._primary.try_vote()  # maybe it waited for what the standby no longer has
        else:
            self._give_up(f"it can make version {reach}, not {member.step}")

    def _held(self, reach: int) -> None:
        member = self._primary.member
        promised = member.step + (member.vote is not None)
        self.bond, tells = bond.acknowledge(self.bond, reach, promised)
        if tells:
            self._primary.report_steps()  # what the standby did not see happen must be known when it is relied on
            self._say(in_sync=True, detail=f"in sync at step {reach}")
        self._primary.try_vote()

    # ---- patience ----

    def _watch_soon(self) -> None:
        if not self._is_watching:
            self._is_watching = True
            self._reactor.call_later(_WATCH_S, self._watch)

    def _watch(self) -> None:
        """A standby that votes wait for and that does nothing is reported: the master then plans without it."""
        self._is_watching = False
        if not self._line.addresses:
            return
        now_s, connection = time.monotonic(), self._line.connection
        mark = (connection, connection.sent_bytes if connection is not None else 0, self._heard, self.bond)
        if mark != self._mark or not self._is_awaited():
            self._mark, self._quiet_since_s = mark, now_s
        elif now_s - self._quiet_since_s >= PATIENCE_S:
            self._give_up(f"it has not answered for {now_s - self._quiet_since_s:.0f} s")
        self._watch_soon()

    def _is_awaited(self) -> bool:
        """Whether a vote waits for the standby, or will."""
        step, member = self._primary.step, self._primary.member
        if step is None:
            return False
        if member.vote is None and step.is_complete and not self.may_vote():
            return True
        return self.bond.is_bound and self._line.connection is None

    def _give_up(self, why: str) -> None:
        if not self._gave_up:
            self._gave_up = True
            self._say(in_sync=False, detail=why)

    def _say(self, *, in_sync: bool, detail: str) -> None:
        plan = self._primary.plan
        assert plan is not None
        state = StandbyState(generation=plan.generation, attempt=self.bond.attempt, in_sync=in_sync, detail=detail)
        self._primary.report(ProcessReport(standby_state=state))
