"""Frames arriving at a partition: checked against layout and step before memory is given, then acted on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pscluster.errors import AuthError, FrameError, PsError
from pscluster.step.audit import AuditRole
from pscluster.step.codec import BufferNode, as_bytes
from pscluster.step.tree import Summary, summary_bytes
from pscluster.wire.connection import Connection
from pscluster.wire.frame import (
    IN_MEMORY,
    MAX_SMALL_BYTES,
    SUMMARY,
    UNCHANGED,
    AckResult,
    Codec,
    FrameKind,
    Header,
    lane_of,
)
from pscluster.wire.partition_protocol import Join, Sync, Vote
from pscluster.wire.protocol import (
    MAX_HELLO_BYTES,
    WEIGHT_BYTES,
    Hello,
    LeafDigest,
    Outcome,
    unpack_statistics,
    unpack_weight,
)
from psserver.partition.actions import Action, JoinJob, ServePulls, TryVote
from psserver.partition.ingress.clients import Client
from psserver.partition.ingress.handshake import shake_hands
from psserver.partition.partition import Partition
from psserver.partition.replication.standby import Standby
from psserver.partition.step.open_step import OpenStep

_FITTING = {
    "push": frozenset({FrameKind.INIT, FrameKind.PUSH, FrameKind.STATISTICS, FrameKind.OUTCOME, FrameKind.AUDIT}),
    "pull": frozenset({FrameKind.PULL}),
    "vote": frozenset({FrameKind.VOTE, FrameKind.JOIN}),
    "replica": frozenset({FrameKind.SYNC, FrameKind.PIECE, FrameKind.PUSH, FrameKind.DECISION, FrameKind.METADATA}),
}
_TO_COORDINATOR = frozenset({FrameKind.STATISTICS, FrameKind.OUTCOME, FrameKind.AUDIT, FrameKind.VOTE, FrameKind.JOIN})
_SMALL = frozenset({FrameKind.STATISTICS, FrameKind.OUTCOME, FrameKind.JOIN, FrameKind.DECISION, FrameKind.METADATA})
_TO_STANDBY = _FITTING["replica"] - {FrameKind.PUSH}


class FrameHandler:
    """The `ConnectionHandler` of every connection that a partition accepts. `carry_out` executes what follows.

    The connection has verified checksums. A gradient in shared memory has none: the trainer wrote it on this host."""

    def __init__(self, partition: Partition, carry_out: Callable[[list[Action]], None]) -> None:
        self._partition = partition
        self._carry_out = carry_out
        self.early: list[tuple[Client, Header, bytes]] = []  # summaries of the step after the open one

    def body_target(self, connection: Connection, header: Header) -> memoryview:
        """Memory for a body, or FrameError: nothing is allocated for what is not expected."""
        client = self._partition.clients.of(connection)
        self._check_sender(client, header)
        if header.kind is FrameKind.HELLO:
            return _small(header, MAX_HELLO_BYTES)
        if header.kind is FrameKind.VOTE:
            blocks = sum(b.num_blocks for b in self._partition.state.layout.buckets) if self._partition.state else 0
            return _small(header, Vote.max_bytes(blocks))
        if header.kind in (FrameKind.STATISTICS, FrameKind.AUDIT):
            self._check_tree_node(header)
        if header.kind is FrameKind.PIECE:
            return self._standby(header).target(header)
        if header.kind in (FrameKind.SYNC, FrameKind.AUDIT):
            if header.kind is FrameKind.AUDIT:
                _role_of(header)
            tensors = len(self._partition.state.layout.tensors) if self._partition.state else 0
            return _small(header, (Sync if header.kind is FrameKind.SYNC else LeafDigest).max_bytes(tensors))
        if header.kind in _SMALL:
            return _small(header, MAX_SMALL_BYTES)
        if header.kind in (FrameKind.PUSH, FrameKind.INIT):
            return self._bucket_target(client, header)
        raise FrameError(f"an unexpected {header.kind.name}", details={"field": "kind"})

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        """A complete, verified frame."""
        partition, client = self._partition, self._partition.clients.of(connection)
        self._check_sender(client, header)
        if not header.length and header.kind is not FrameKind.PULL:
            self.body_target(connection, header)  # no memory was asked for: check now what would have been checked then
        if header.kind is FrameKind.HELLO:
            self._carry_out(shake_hands(partition, client, header, Hello.unpack(body)))
        elif header.kind is FrameKind.PUSH:
            self._push(client, header, body)
        elif header.kind is FrameKind.INIT:
            self._initial(client, header, body)
        elif header.kind is FrameKind.PULL and partition.state is not None:
            partition.clients.take_pull(client, header, partition.state)
            self._carry_out([ServePulls()])
        elif header.kind in _TO_COORDINATOR:
            self._for_coordinator(client, header, body)
        elif header.kind in _TO_STANDBY:
            self._carry_out(self._standby(header).receive(header, body))
        else:
            raise FrameError(f"an unexpected {header.kind.name}", details={"field": "kind"})

    def closed(self, connection: Connection, error: PsError | None) -> None:
        if error is not None:
            self._partition.counters.refused(error)
        client = self._partition.clients.of(connection)
        if isinstance(client.landing, torch.Tensor) and self._partition.step is not None:
            self._partition.step.pool.give(client.landing)  # a body that never became whole
        self._partition.clients.forget(connection)  # its nodes stay, its credit goes with it

    def replay_early(self) -> None:
        """Handle the frames that arrived before their step was open."""
        early, self.early = self.early, []
        for client, header, body in early:
            if client.connection.is_open:
                self.frame(client.connection, header, memoryview(body))

    def _check_sender(self, client: Client, header: Header) -> None:
        if header.job != self._partition.job:
            raise FrameError("a frame of another job", details={"field": "job"})
        if not client.channel and header.kind is not FrameKind.HELLO:
            raise AuthError(f"a {header.kind.name} before HELLO")
        if client.channel and header.kind not in _FITTING[client.channel]:
            raise FrameError(f"a {header.kind.name} on a {client.channel} connection", details={"field": "kind"})
        if client.channel and header.sender != client.index:
            raise FrameError(f"a {header.kind.name} in the name of {header.sender}", details={"field": "sender"})

    # ---- frames for a role ----

    def _for_coordinator(self, client: Client, header: Header, body: memoryview) -> None:
        coordinator = self._partition.coordinator
        if coordinator is None:
            what = f"{header.kind.name} sent to a partition that is not the coordinator"
            raise FrameError(what, details={"field": "kind"})
        if client.channel == "vote" and client.index == self._partition.index:
            what = f"a {header.kind.name} in the name of the coordinator itself"
            raise FrameError(what, details={"field": "sender"})
        if header.kind is FrameKind.VOTE:
            self._carry_out(coordinator.vote(Vote.unpack(header, body)))
        elif header.kind is FrameKind.JOIN:
            self._carry_out(coordinator.join(client.index, header.step, Join.unpack(body).last))
        else:
            if header.kind is FrameKind.STATISTICS:
                self._carry_out(coordinator.statistics(header.step, header.node, unpack_statistics(body)))
            elif header.kind is FrameKind.AUDIT:
                role, digest = _role_of(header), LeafDigest.unpack(body)
                self._carry_out(coordinator.audit(header.step, header.node.first, role, client.index, digest))
            else:
                self._carry_out(coordinator.outcome(header.step, Outcome.unpack(body)))
            self._partition.clients.acknowledge(client, header, AckResult.APPLIED, -1)

    def _standby(self, header: Header) -> Standby:
        standby = self._partition.standby
        if standby is None:
            raise FrameError(f"{header.kind.name} sent to a partition", details={"field": "kind"})
        return standby

    # ---- pushes ----

    def _bucket_target(self, client: Client, header: Header) -> memoryview:
        state, step = self._partition.state, self._partition.step
        assert state is not None and step is not None  # no handshake succeeds before
        if header.kind is FrameKind.PUSH and header.bucket == SUMMARY:
            self._check_tree_node(header)
            _expect(header, summary_bytes(len(state.layout.tensors)))
            return memoryview(bytearray(header.length))
        if header.bucket >= len(state.spans):
            raise FrameError(
                f"there is no bucket {header.bucket}: the layout has {len(state.spans)}", details={"field": "bucket"}
            )
        span = state.spans[header.bucket]
        if not span.num_words:
            raise FrameError(f"bucket {header.bucket}, of which there is nothing here", details={"field": "bucket"})
        self._check_node(header, state.layout.buckets[header.bucket].kind)
        if header.flags & UNCHANGED:
            _expect(header, WEIGHT_BYTES)
            return memoryview(bytearray(header.length))
        trained = header.kind is FrameKind.PUSH and header.bucket in step.trained
        network = self._partition.spec.network
        expected = Codec.of(network.push_codec) if trained else Codec.FP32
        if header.codec is not expected:
            raise FrameError(f"words in {header.codec.name}, not {expected.name}", details={"field": "codec"})
        if header.flags & IN_MEMORY:
            _expect(header, 0)
            if client.lanes is None or not trained or lane_of(header) >= client.lanes.num_lanes:
                raise FrameError(f"no lane {lane_of(header)} of bucket {header.bucket}", details={"field": "flags"})
            return memoryview(b"")
        _expect(header, state.layout.wire_bytes(span, network.push_codec if trained else "fp32"))
        if trained:
            is_open = self._is_open(header)
            is_wanted = not step.trained[header.bucket].holds(header.node) if is_open else self._is_ahead(header)
            if not is_wanted:  # what is ahead may be open once it is here
                return client.discard(header.length)
            words = step.pool.take(span.num_words)
            client.landing = words
            return as_bytes(words)
        return memoryview(bytearray(header.length))

    def _check_tree_node(self, header: Header) -> None:
        step = self._partition.step
        if step is None or header.node not in step.summary.tree:
            raise FrameError(f"no node {tuple(header.node)} of the step's tree", details={"field": "node"})

    def _check_node(self, header: Header, kind: str) -> None:
        partition = self._partition
        tree = partition.step.summary.tree if partition.step else None
        only_root = kind == "carried" or header.kind is FrameKind.INIT
        known = (header.node.first, header.node.leaves) == (0, 1) if only_root else tree and header.node in tree
        unfit = header.flags & UNCHANGED and kind not in ("averaged", "carried")
        if not known or unfit or (header.kind is FrameKind.PUSH and kind == "frozen"):
            raise FrameError(f"no node {tuple(header.node)} of a {kind} bucket", details={"field": "node"})

    def _is_in_time(self, header: Header) -> bool:
        """Whether nothing was restored since."""
        plan = self._partition.plan
        return plan is not None and header.generation >= plan.restore_generation

    def _is_open(self, header: Header) -> bool:
        return self._is_in_time(header) and header.step == self._partition.member.step

    def _is_ahead(self, header: Header) -> bool:
        """Whether it is of a step that the others have, and this partition has not: it took the place of one that had,
        and still waits for the last decision."""
        return self._is_in_time(header) and header.step > self._partition.member.step

    def _push(self, client: Client, header: Header, body: memoryview) -> None:
        partition, landing = self._partition, client.landing
        if header.step == partition.member.step + 1 and header.bucket == SUMMARY:
            self.early.append((client, header, bytes(body)))  # from a trainer that waits for nothing of this partition
            return
        if self._is_ahead(header):
            client.connection.close()  # not acknowledged, so that it is sent again; `closed` frees its memory
            return
        client.landing = None
        with partition.counters.phase("sum"):
            result, size = self._offer(client, header, body, landing)
        partition.counters.pushed(result, size)
        partition.clients.acknowledge(client, header, result, partition.open_bucket)
        self._carry_out([TryVote()])

    def _offer(self, client: Client, header: Header, body: memoryview, landing: object) -> tuple[AckResult, int]:
        """Have the open step take a node; what became of it, and its bytes."""
        step, state = self._partition.step, self._partition.state
        assert step is not None and state is not None
        is_open = self._is_open(header)
        client.pushed_bytes += header.length
        if header.bucket in step.trained:
            node = self._gradient(client, header, landing)
            if node is None:  # known to be unwanted before it was read; what is not kept costs no credit
                client.granted_bytes += header.length
                return AckResult.DUPLICATE if is_open else AckResult.STALE, header.length
            words, release = node
            if not is_open:
                release()
                return AckResult.STALE, words.nbytes
            fresh = step.offer_trained(header.bucket, header.node, words, release)
            return AckResult.APPLIED if fresh else AckResult.DUPLICATE, words.nbytes
        client.granted_bytes += header.length
        if not is_open:
            return AckResult.STALE, header.length
        if header.bucket == SUMMARY:
            fresh = step.offer_summary(header.node, Summary.unpack(body, len(state.layout.tensors)))
        else:
            fresh = step.offer_buffers(header.bucket, header.node, self._buffer_node(header, body))
        return AckResult.APPLIED if fresh else AckResult.DUPLICATE, header.length

    def _gradient(
        self, client: Client, header: Header, landing: object
    ) -> tuple[torch.Tensor, Callable[[], None]] | None:
        """The words of a pushed gradient, where they lie, and what gives that memory back; None: discarded."""
        partition = self._partition
        assert partition.step is not None
        if header.flags & IN_MEMORY:
            assert client.lanes is not None  # checked with the lane
            lane = lane_of(header)
            place = client.lanes.place(header.bucket, lane)
            words = torch.frombuffer(place, dtype=partition.step.pool.dtype)
            return words, partial(client.lanes.give_back, header.bucket, lane)
        if isinstance(landing, torch.Tensor):
            return landing, partial(self._release, client, landing, partition.step)
        return None

    def _release(self, client: Client, words: torch.Tensor, step: OpenStep) -> None:
        """Memory of a client's node is free again."""
        step.pool.give(words)
        self._partition.clients.credit(client, words.nbytes, self._partition.open_bucket)

    def _buffer_node(self, header: Header, body: memoryview) -> BufferNode:
        state = self._partition.state
        assert state is not None
        if header.flags & UNCHANGED:
            return BufferNode(unpack_weight(body), None)
        return BufferNode(0.0, torch.frombuffer(body, dtype=state.values[header.bucket].dtype))

    def _initial(self, client: Client, header: Header, body: memoryview) -> None:
        state = self._partition.state
        assert state is not None
        if header.bucket not in state.filled:
            as_bytes(state.values[header.bucket])[:] = body
            if state.fill(header.bucket):
                self._carry_out([JoinJob()])
        self._partition.clients.acknowledge(client, header, AckResult.APPLIED, -1)


def _role_of(header: Header) -> AuditRole:
    if header.node.leaves != 1:
        raise FrameError(f"an audit of the node {tuple(header.node)}", details={"field": "node"})
    try:
        return AuditRole(header.bucket)
    except ValueError:
        raise FrameError(f"no role {header.bucket} in an audit", details={"field": "bucket"}) from None


def _small(header: Header, limit: int) -> memoryview:
    if header.length > limit:
        what = f"{header.kind.name} of {header.length} bytes, of which {limit} are allowed"
        raise FrameError(what, details={"field": "length"})
    return memoryview(bytearray(header.length))


def _expect(header: Header, length: int) -> None:
    if header.length != length:
        what = f"{header.kind.name} of {header.length} bytes where {length} are expected"
        raise FrameError(what, details={"field": "length"})
