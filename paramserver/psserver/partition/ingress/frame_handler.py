"""Frames arriving at a partition: checked against layout and step before memory is given, then handed on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from pscluster.errors import AuthError, FrameError, PsError
from pscluster.job.spec import JobSpec
from pscluster.step.codec import BufferNode, as_bytes
from pscluster.step.summary import Summary, summary_bytes
from pscluster.v1.plan_pb2 import Plan
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
from pscluster.wire.partition_protocol import Sync, Vote
from pscluster.wire.protocol import MAX_HELLO_BYTES, WEIGHT_BYTES, Hello, unpack_weight
from psserver.partition.ingress.clients import Client, Clients
from psserver.partition.step.commit import Member
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters

_FITTING = {
    "push": frozenset({FrameKind.INIT, FrameKind.PUSH, FrameKind.STATISTICS, FrameKind.OUTCOME}),
    "pull": frozenset({FrameKind.PULL}),
    "vote": frozenset({FrameKind.VOTE, FrameKind.JOIN}),
    "replica": frozenset({FrameKind.SYNC, FrameKind.PIECE, FrameKind.PUSH, FrameKind.DECISION, FrameKind.METADATA}),
}
_TO_STANDBY = _FITTING["replica"] - {FrameKind.PUSH}


class Receiver(Protocol):
    """What the reception asks of the partition behind it. Everything on the partition's thread."""

    spec: JobSpec
    plan: Plan | None
    state: PartitionState | None
    step: OpenStep | None
    member: Member
    clients: Clients
    counters: PartitionCounters

    @property
    def job(self) -> int:
        """The job's number in frames."""

    def greet(self, client: Client, header: Header, hello: Hello) -> None:
        """A HELLO."""

    def take_initial(self, bucket: int) -> None:
        """A bucket has its first values."""

    def try_vote(self) -> None:
        """A push was taken: the step may be complete."""

    def hold_early(self, client: Client, header: Header, body: memoryview) -> None:
        """A summary of the step after the open one: to be handed in again when it is open."""

    def handle_coordinator_frame(self, client: Client, header: Header, body: memoryview) -> None:
        """What only the coordinator hears: votes, joins, evaluations, outcomes."""

    def handle_primary_frame(self, client: Client, header: Header, body: memoryview) -> None:
        """What only a standby hears: a state, decisions, notes."""

    def piece_target(self, header: Header) -> memoryview:
        """Where a piece of a state belongs."""

    def serve_pulls(self) -> None:
        """Send what is owed and new enough."""

    @property
    def open_bucket(self) -> int:
        """The bucket of gradients that is waited for first; -1: none."""

    def release(self, client: Client, words: torch.Tensor, step: OpenStep) -> None:
        """Memory of a client's node is free again."""

    def connection_closed(self, connection: Connection) -> None:
        """A connection is gone."""


class FrameHandler:
    """The `Handler` of every connection that a partition accepts."""

    def __init__(self, service: Receiver) -> None:
        self._service = service

    def body_target(self, connection: Connection, header: Header) -> memoryview:
        """Memory for a body, or FrameError: nothing is allocated for what is not expected."""
        client = self._service.clients.of(connection)
        self._check_sender(client, header)
        if header.kind is FrameKind.HELLO:
            return _small(header, MAX_HELLO_BYTES)
        if header.kind is FrameKind.VOTE:
            blocks = sum(b.num_blocks for b in self._service.state.layout.buckets) if self._service.state else 0
            return _small(header, Vote.max_bytes(blocks))
        if header.kind is FrameKind.STATISTICS:
            self._check_tree_node(header)
        if header.kind is FrameKind.PIECE:
            return self._service.piece_target(header)
        if header.kind is FrameKind.SYNC:
            tensors = len(self._service.state.layout.tensors) if self._service.state else 0
            return _small(header, Sync.max_bytes(tensors))
        if header.kind in (
            FrameKind.STATISTICS,
            FrameKind.OUTCOME,
            FrameKind.JOIN,
            FrameKind.DECISION,
            FrameKind.METADATA,
        ):
            return _small(header, MAX_SMALL_BYTES)
        if header.kind in (FrameKind.PUSH, FrameKind.INIT):
            return self._bucket_target(client, header)
        raise FrameError(f"an unexpected {header.kind.name}", details={"field": "kind"})

    def frame(self, connection: Connection, header: Header, body: memoryview) -> None:
        """A complete, verified frame."""
        service, client = self._service, self._service.clients.of(connection)
        self._check_sender(client, header)
        if not header.length and header.kind is not FrameKind.PULL:
            self.body_target(connection, header)  # asked for no memory: refused now what would have been refused then
        if header.kind is FrameKind.HELLO:
            service.greet(client, header, Hello.unpack(body))
        elif header.kind is FrameKind.PUSH:
            self._push(client, header, body)
        elif header.kind is FrameKind.INIT:
            self._initial(client, header, body)
        elif header.kind is FrameKind.PULL and service.state is not None:
            service.clients.take_pull(client, header, service.state)
            service.serve_pulls()
        elif header.kind in (FrameKind.STATISTICS, FrameKind.OUTCOME, FrameKind.VOTE, FrameKind.JOIN):
            service.handle_coordinator_frame(client, header, body)
        elif header.kind in _TO_STANDBY:
            service.handle_primary_frame(client, header, body)
        else:
            raise FrameError(f"an unexpected {header.kind.name}", details={"field": "kind"})

    def closed(self, connection: Connection, error: PsError | None) -> None:
        if error is not None:
            self._service.counters.refused(error)
        client = self._service.clients.of(connection)
        if isinstance(client.landing, torch.Tensor) and self._service.step is not None:
            self._service.step.pool.give(client.landing)  # a body that never became whole
        self._service.connection_closed(connection)

    def _check_sender(self, client: Client, header: Header) -> None:
        if header.job != self._service.job:
            raise FrameError("a frame of another job", details={"field": "job"})
        if not client.channel and header.kind is not FrameKind.HELLO:
            raise AuthError(f"a {header.kind.name} before the greeting")
        if client.channel and header.kind not in _FITTING[client.channel]:
            raise FrameError(f"a {header.kind.name} on a {client.channel} connection", details={"field": "kind"})
        if client.channel and header.sender != client.index:
            raise FrameError(f"a {header.kind.name} in the name of {header.sender}", details={"field": "sender"})

    # ---- pushes ----

    def _bucket_target(self, client: Client, header: Header) -> memoryview:
        state, step = self._service.state, self._service.step
        assert state is not None and step is not None  # greeted only then
        if header.kind is FrameKind.PUSH and header.bucket == SUMMARY:
            self._check_tree_node(header)
            _expect(header, summary_bytes(len(state.layout.tensors)))
            return memoryview(bytearray(header.length))
        if header.bucket >= len(state.spans):
            raise FrameError(f"bucket {header.bucket} of {len(state.spans)}", details={"field": "bucket"})
        span = state.spans[header.bucket]
        if not span.num_words:
            raise FrameError(f"bucket {header.bucket}, of which there is nothing here", details={"field": "bucket"})
        self._check_node(header, state.layout.buckets[header.bucket].kind)
        if header.flags & UNCHANGED:
            _expect(header, WEIGHT_BYTES)
            return memoryview(bytearray(header.length))
        trained = header.kind is FrameKind.PUSH and header.bucket in step.trained
        network = self._service.spec.network
        expected = Codec.of(network.push_codec) if trained else Codec.FP32
        if header.codec is not expected:
            raise FrameError(f"words in {header.codec.name}, not {expected.name}", details={"field": "codec"})
        if header.flags & IN_MEMORY:
            self._check_lane(client, header, trained)
            return memoryview(b"")
        _expect(header, state.layout.wire_bytes(span, network.push_codec if trained else "fp32"))
        if trained:
            is_held = self._is_open(header) and step.trained[header.bucket].holds(header.node)
            if is_held or not (
                self._is_open(header) or self._is_ahead(header)
            ):  # what is ahead may be open once it is here
                return client.discard(header.length)
            words = step.pool.take(span.num_words)
            client.landing = words
            return as_bytes(words)
        return memoryview(bytearray(header.length))

    def _check_lane(self, client: Client, header: Header, trained: bool) -> None:
        _expect(header, 0)
        if client.lanes is None or not trained or lane_of(header) >= client.lanes.num_lanes:
            raise FrameError(f"no lane {lane_of(header)} of bucket {header.bucket}", details={"field": "flags"})

    def _check_tree_node(self, header: Header) -> None:
        step = self._service.step
        if step is None or header.node not in step.summary.tree:
            raise FrameError(f"no node {tuple(header.node)} of the step's tree", details={"field": "node"})

    def _check_node(self, header: Header, kind: str) -> None:
        service = self._service
        tree = service.step.summary.tree if service.step else None
        only_root = kind == "carried" or header.kind is FrameKind.INIT
        known = (header.node.first, header.node.leaves) == (0, 1) if only_root else tree and header.node in tree
        unfit = header.flags & UNCHANGED and kind not in ("averaged", "carried")
        if not known or unfit or (header.kind is FrameKind.PUSH and kind == "frozen"):
            raise FrameError(f"no node {tuple(header.node)} of a {kind} bucket", details={"field": "node"})

    def _is_in_time(self, header: Header) -> bool:
        """Whether nothing was restored since."""
        plan = self._service.plan
        return plan is not None and header.generation >= plan.restore_generation

    def _is_open(self, header: Header) -> bool:
        return self._is_in_time(header) and header.step == self._service.member.step

    def _is_ahead(self, header: Header) -> bool:
        """Whether it is of a step that the others have, and this partition has not: it took the place of one that had,
        and still waits for the last decision."""
        return self._is_in_time(header) and header.step > self._service.member.step

    def _push(self, client: Client, header: Header, body: memoryview) -> None:
        service, landing = self._service, client.landing
        if header.step == service.member.step + 1 and header.bucket == SUMMARY:
            service.hold_early(client, header, body)
            return
        if self._is_ahead(header):
            client.connection.close()  # not acknowledged, so that it comes again; `closed` frees where it landed
            return
        client.landing = None
        with service.counters.phase("sum"):
            result, size = self._offer(client, header, body, landing)
        service.counters.pushed(result, size)
        service.clients.acknowledge(client, header, result, service.open_bucket)
        service.try_vote()

    def _offer(self, client: Client, header: Header, body: memoryview, landing: object) -> tuple[AckResult, int]:
        """Have the open step take a node; what became of it, and its bytes."""
        step, state = self._service.step, self._service.state
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
        service = self._service
        assert service.step is not None
        if header.flags & IN_MEMORY:
            assert client.lanes is not None  # checked with the lane
            lane = lane_of(header)
            place = client.lanes.place(header.bucket, lane)
            words = torch.frombuffer(place, dtype=service.step.pool.dtype)
            return words, partial(client.lanes.give_back, header.bucket, lane)
        if isinstance(landing, torch.Tensor):
            return landing, partial(service.release, client, landing, service.step)
        return None

    def _buffer_node(self, header: Header, body: memoryview) -> BufferNode:
        state = self._service.state
        assert state is not None
        if header.flags & UNCHANGED:
            return BufferNode(unpack_weight(body), None)
        return BufferNode(0.0, torch.frombuffer(body, dtype=state.values[header.bucket].dtype))

    def _initial(self, client: Client, header: Header, body: memoryview) -> None:
        state = self._service.state
        assert state is not None
        if header.bucket not in state.filled:
            as_bytes(state.values[header.bucket])[:] = body
            self._service.take_initial(header.bucket)
        self._service.clients.acknowledge(client, header, AckResult.APPLIED, -1)


def _small(header: Header, limit: int) -> memoryview:
    if header.length > limit:
        raise FrameError(
            f"{header.kind.name} of {header.length} bytes, of which {limit} are allowed", details={"field": "length"}
        )
    return memoryview(bytearray(header.length))


def _expect(header: Header, length: int) -> None:
    if header.length != length:
        raise FrameError(
            f"{header.kind.name} of {header.length} bytes where {length} are expected", details={"field": "length"}
        )
