"""A primary's connection to its standby: the state once, then the sums of each step and the decision on it.

    HELLO -> WELCOME: what the standby holds -> SYNC, PIECEs (or what it misses, after a reconnect) -> HELD
    each step: PUSH of every bucket's root and of the summary's, as they are complete -> HELD; then DECISION

The sums are sent while backward still fills other buckets, from the memory that they were added in. What waits for the
standby, and when the two are in sync, is decided in `in_sync`."""

from __future__ import annotations

import time
from collections.abc import Callable

from pscluster.errors import PsError
from pscluster.step.codec import BufferNode, as_bytes
from pscluster.step.layout import WORD_BYTES
from pscluster.step.tree import Summary
from pscluster.v1.plan_pb2 import Plan, ProcessReport, StandbyState
from pscluster.wire.connection import Connection
from pscluster.wire.dialer import ReconnectingConnection
from pscluster.wire.frame import SUMMARY, UNCHANGED, Codec, FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Sync
from pscluster.wire.protocol import StandbyWelcome, pack_weight
from pscluster.wire.reactor import Reactor
from psserver.partition.actions import Action, Report, ReportSteps, TryVote
from psserver.partition.partition import Partition
from psserver.partition.replication import in_sync
from psserver.partition.replication.in_sync import InSyncState
from psserver.partition.step.open_step import OpenStep

PATIENCE_S = 5.0  # in which a standby that votes wait for must do something
QUEUE_BYTES = 64 << 20  # of sums on their way to a standby that is not in sync, or those of two steps if that is more
_RETRY_S = (0.05, 1.0)
_WATCH_S = 0.5


class Replication:
    """To the standby that the plan names, if any. On the partition's thread; never blocks."""

    def __init__(self, reactor: Reactor, partition: Partition, carry_out: Callable[[list[Action]], None]) -> None:
        self.in_sync = InSyncState()
        self._reactor = reactor
        self._partition = partition
        self._carry_out = carry_out
        kinds = frozenset({FrameKind.ACK, FrameKind.HELD})
        self._dialer = ReconnectingConnection(
            reactor, self, lambda _: partition.make_hello("replica"), channel="replica", kinds=kinds,
            transport=partition.spec.network.transport, retry_s=_RETRY_S,
        )  # fmt: skip
        self._streams = False  # the standby was sent a state, or has one: steps follow
        self._sent: set[int] = set()  # buckets of the open step that were sent over this connection
        self._queued_bytes = 0  # of sums
        self._is_watching = False
        self._num_received = 0
        self._mark: object = None
        self._quiet_since_s = 0.0
        self._gave_up = False

    # ---- plans and the step's cycle ----

    def adopt(self, plan: Plan, *, restored: bool) -> None:
        """A plan names the standby, or none."""
        placement = plan.partitions[self._partition.index]
        attempt = placement.standby.attempt if placement.HasField("standby") else 0
        addresses = list(placement.standby.addresses)
        peer = self._partition.process_id_of(self._partition.index, attempt)
        before, self.in_sync = self.in_sync, in_sync.adopt(self.in_sync, attempt, restored=restored)
        if self.in_sync is before and (addresses, peer) == (self._dialer.addresses, self._dialer.peer):
            return
        self._forget_connection()
        self._dialer.follow(addresses, peer)
        self._gave_up = False
        if addresses:
            self._watch_soon()

    def close(self) -> None:
        """Close the connection; only another plan dials again."""
        self._forget_connection()
        self._dialer.close()

    def may_vote(self) -> bool:
        """Whether the complete step may be voted on; `TryVote` follows when that has changed."""
        if not in_sync.may_vote(self.in_sync, self._partition.member.step):
            return False
        return self.in_sync.ack_required or self._queued_bytes <= self._limit_bytes()

    def offer(self) -> None:
        """Send what of the open step is complete and was not sent."""
        step = self._partition.step
        if not self._streams or step is None:
            return
        for bucket in step.complete_buckets():
            if bucket not in self._sent:
                self._sent.add(bucket)
                self._send_root(step, bucket)
            if not self._streams:
                return  # it broke within the send: the rest is sent over the next connection

    def decided(self, decision: CommitDecision) -> None:
        """A decision is about to be carried out: the sums will be overwritten."""
        if self._dialer.connection is not None and self._streams:
            self._dialer.connection.detach(("step", decision.step))
            self._send_decision(decision)
        self._sent.clear()

    def at_boundary(self) -> None:
        """The state is that of a step: send it to a standby that waits for it."""
        partition, state, connection = self._partition, self._partition.state, self._dialer.connection
        if connection is None or self._streams or state is None or not state.is_filled or partition.machine.is_updating:
            return
        self._stream()
        sync = Sync(
            update_counts=state.update_counts,
            decision=partition.member.last_decision,
            metadata=partition.metadata.to_wire(),
        )
        connection.send(partition.header(kind=FrameKind.SYNC, step=partition.member.step), [sync.pack()])
        with partition.counters.phase("snapshot"):
            pieces = state.pieces()
        for (bucket, what), data in pieces.items():
            number = 0 if what == "values" else 1 + int(what.removeprefix("moment"))
            header = partition.header(kind=FrameKind.PIECE, step=partition.member.step, bucket=bucket, flags=number)
            self._send(header, data)
        self.offer()

    def send_metadata(self) -> None:
        """The replicated metadata has changed."""
        if self._dialer.connection is not None and self._streams:
            header = self._partition.header(kind=FrameKind.METADATA, step=self._partition.member.step)
            self._dialer.connection.send(header, [self._partition.metadata.to_wire().pack()])

    @property
    def lag_steps(self) -> int | None:
        """How many committed steps the standby could not make; None: it holds nothing."""
        return max(0, self._partition.version - self.in_sync.acked_version) if self.in_sync.acked_version >= 0 else None

    # ---- sending ----

    def _send_root(self, step: OpenStep, bucket: int) -> None:
        sums = step.summary if bucket == SUMMARY else step.sums(bucket)
        root, counts, flags, codec = sums.root, 0, 0, Codec.FP32
        body: bytes | memoryview
        if isinstance(root, Summary):
            body = root.pack()
        elif isinstance(root, BufferNode) and root.words is None:
            body, flags = pack_weight(root.weight), UNCHANGED
        else:
            words = root.words if isinstance(root, BufferNode) else root
            assert words is not None
            body = as_bytes(words)
            counts = body.nbytes
            if bucket in step.trained:
                codec = Codec.of(self._partition.spec.network.push_codec)
        self._queued_bytes += counts
        where = {"step": self._partition.member.step, "bucket": bucket, "node": sums.tree.root}
        self._send(self._partition.header(kind=FrameKind.PUSH, flags=flags, codec=codec, **where), body, counts=counts)

    def _send(self, header: Header, body: bytes | bytearray | memoryview, *, counts: int = 0) -> None:
        """`counts`: bytes of sums, which lie in memory that the decision on the step will overwrite."""
        connection = self._dialer.connection
        if connection is None:
            return
        self._partition.counters.replicated_bytes += memoryview(body).nbytes
        sent = (lambda: self._left(connection, counts)) if counts else None
        connection.send(header, [body], tag=("step", header.step) if counts else None, on_sent=sent)

    def _left(self, connection: Connection, size_bytes: int) -> None:
        """Sums of that size are in the kernel's hands."""
        if connection is self._dialer.connection:
            held_back = self._queued_bytes > self._limit_bytes()
            self._queued_bytes -= size_bytes
            if held_back and self._queued_bytes <= self._limit_bytes():
                self._reactor.post(lambda: self._carry_out([TryVote()]))

    def _send_decision(self, decision: CommitDecision) -> None:
        header = self._partition.header(kind=FrameKind.DECISION, step=decision.step)
        self._send(header, decision.pack())

    def _limit_bytes(self) -> int:
        state = self._partition.state
        step_bytes = sum(span.num_words for span in state.spans) * WORD_BYTES if state else 0
        return max(QUEUE_BYTES, 2 * step_bytes)

    # ---- what the standby sends ----

    def welcomed(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - Listener's signature
        self._num_received += 1
        self._begin(StandbyWelcome.unpack(body))

    def frame(self, header: Header, body: memoryview) -> None:  # noqa: ARG002 - Listener's signature
        self._num_received += 1
        if header.kind is FrameKind.HELD:
            self._held(header.step)

    def lost(self, error: PsError | None) -> None:
        """Maybe within a send, whose caller relies on the open step: a vote, and what follows from it, comes later."""
        if error is not None:
            self._partition.counters.refused(error)
        self._forget_connection()
        self._reactor.post(lambda: self._carry_out([TryVote()]))  # a queue that was too long is no more

    def _stream(self) -> None:
        """Steps follow from here on; nothing of the open one was sent over this connection yet."""
        self._streams = True
        self._sent.clear()

    def _forget_connection(self) -> None:
        self._streams, self._queued_bytes = False, 0

    def _begin(self, welcome: StandbyWelcome) -> None:
        """The standby reports what it holds: send what it misses, or the whole state."""
        acked_version, applied, member = welcome.reach, welcome.applied, self._partition.member
        if in_sync.resumes(self.in_sync, acked_version, applied, member.step):
            self._stream()
            if applied < member.step and member.last_decision is not None:
                self._send_decision(member.last_decision)
            self.send_metadata()  # it may have changed; before the sums: a standby that holds those has it, too
            self._held(acked_version)
            self.offer()
        elif (anew := in_sync.begin(self.in_sync)) is not None:
            self.in_sync = anew
            self.at_boundary()
            self._carry_out([TryVote()])  # it may have waited for what the standby has lost
        else:
            self._give_up(f"it can make version {acked_version}, not {member.step}")

    def _held(self, acked_version: int) -> None:
        member = self._partition.member
        promised = member.step + (member.vote is not None)
        self.in_sync, reports = in_sync.acknowledge(self.in_sync, acked_version, promised)
        if reports:  # first the steps that the standby did not see: the master relies on the pair from here on
            self._carry_out([ReportSteps(), self._report(in_sync=True, detail=f"in sync at step {acked_version}")])
        self._carry_out([TryVote()])

    # ---- the time limit ----

    def _watch_soon(self) -> None:
        if not self._is_watching:
            self._is_watching = True
            self._reactor.call_later(_WATCH_S, self._watch)

    def _watch(self) -> None:
        """Report a standby that votes wait for and that does nothing: the master then plans without it."""
        self._is_watching = False
        if not self._dialer.addresses:
            return
        now_s, connection = time.monotonic(), self._dialer.connection
        mark = (connection, connection.sent_bytes if connection is not None else 0, self._num_received, self.in_sync)
        if mark != self._mark or not self._is_awaited():
            self._mark, self._quiet_since_s = mark, now_s
        elif now_s - self._quiet_since_s >= PATIENCE_S:
            self._give_up(f"it has not answered for {now_s - self._quiet_since_s:.0f} s")
        self._watch_soon()

    def _is_awaited(self) -> bool:
        """Whether a vote waits for the standby, or will."""
        step, member = self._partition.step, self._partition.member
        if step is None:
            return False
        if member.vote is None and step.is_complete and not self.may_vote():
            return True
        return self.in_sync.ack_required and self._dialer.connection is None

    def _give_up(self, why: str) -> None:
        if not self._gave_up:
            self._gave_up = True
            self._carry_out([self._report(in_sync=False, detail=why)])

    def _report(self, *, in_sync: bool, detail: str) -> Report:
        plan = self._partition.plan
        assert plan is not None
        state = StandbyState(generation=plan.generation, attempt=self.in_sync.attempt, in_sync=in_sync, detail=detail)
        return Report(ProcessReport(standby_state=state))
