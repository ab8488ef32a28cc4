"""The connections to a partition, and what is to be sent over them: credit and requested values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pscluster.step.codec import as_bytes
from pscluster.step.tree import TreeNode
from pscluster.wire.connection import Connection
from pscluster.wire.frame import EXACT, IN_MEMORY, WITH_FROZEN, AckResult, Codec, FrameKind, Header, checksum
from pscluster.wire.memory import Lanes
from pscluster.wire.protocol import Ack
from psserver.partition.step.state import PartitionState


@dataclass(eq=False)
class Client:
    """One accepted connection. `channel`: a trainer's "push" or "pull", a partition's "vote", "" before HELLO."""

    connection: Connection
    channel: str = ""
    index: int = -1  # rank, or partition index
    granted_bytes: int = 0  # of gradients over the socket since the handshake, announced or not
    announced_bytes: int = 0  # that were sent to it
    pushed_bytes: int = 0  # that came
    wanted: int = -1  # version asked for by PULL
    exact: bool = False  # it asked for values that are not rounded
    reads_memory: bool = False  # it maps what is published: values need no body
    lanes: Lanes | None = None  # where it leaves its gradients, when it shares memory
    pending_buckets: set[int] = field(default_factory=set)
    landing: object = None  # what the body being received is for
    scratch: bytearray = field(default_factory=bytearray)

    def discard(self, length: int) -> memoryview:
        """Memory for a body that is not used; its content is garbage afterwards."""
        if len(self.scratch) < length:
            self.scratch = bytearray(length)
        return memoryview(self.scratch)[:length]


class Clients:
    """The trainers' and partitions' connections. On the partition's thread."""

    def __init__(self, header: Callable[..., Header]) -> None:
        self._header = header  # makes a header of this job, generation and sender
        self._by_connection: dict[Connection, Client] = {}
        self.pull_bytes = 0
        self.largest_bytes = 0  # of a gradient's body
        self._checksums: dict[int, tuple[tuple[int, bool] | None, int]] = {}  # by bucket: of the values sent last
        self._open_bucket = -1  # that was sent to every trainer

    def of(self, connection: Connection) -> Client:
        """The client of a connection, made at its first frame."""
        client = self._by_connection.get(connection)
        if client is None:
            client = self._by_connection[connection] = Client(connection)
        return client

    def on(self, channel: str) -> list[Client]:
        """Every client of one channel after its handshake, by index."""
        found = (c for c in self._by_connection.values() if c.channel == channel and c.connection.is_open)
        return sorted(found, key=lambda client: client.index)

    def forget(self, connection: Connection) -> None:
        self._by_connection.pop(connection, None)

    def close_all(self) -> None:
        """Close every connection: a restore begins, and every client must connect again."""
        self._checksums.clear()
        for connection in list(self._by_connection):
            connection.close()

    def acknowledge(self, client: Client, header: Header, result: AckResult, open_bucket: int) -> None:
        """Acknowledge a frame, with how much the trainer may send. One in shared memory needs no answer: its lane says
        when it is free. When a PUSH opened another bucket, trainers that may be out of credit wait for that."""
        if not header.flags & IN_MEMORY:
            self._send_ack(client, header, result, open_bucket)
        if header.kind is FrameKind.PUSH and open_bucket != self._open_bucket:
            self._open_bucket = open_bucket
            for other in self.on("push"):
                if self._may_be_blocked(other):
                    self._send_ack(other, None, AckResult.APPLIED, open_bucket)

    def credit(self, client: Client, size_bytes: int, open_bucket: int) -> None:
        """Memory of a client's node is free again. Its credit is sent at once if it matters, else with the next ACK."""
        client.granted_bytes += size_bytes
        if client.connection.is_open and self._may_be_blocked(client):
            self._send_ack(client, None, AckResult.APPLIED, open_bucket)

    def _may_be_blocked(self, client: Client) -> bool:
        """Whether the client's next frame may not fit the credit that it was sent. When it does, the frames that are on
        their way will be answered."""
        return client.announced_bytes - client.pushed_bytes < self.largest_bytes

    def serve_pulls(self, state: PartitionState, version_of: Callable[[int], int]) -> None:
        """Send every requested bucket whose version is new enough, first-needed first."""
        for client in self.on("pull"):
            ready = [bucket for bucket in sorted(client.pending_buckets) if version_of(bucket) >= client.wanted]
            client.pending_buckets.difference_update(ready)
            if client.reads_memory and not (client.exact and state.rounds):
                for first, count in _runs(ready, lambda bucket: (version_of(bucket), state.published[bucket].dtype)):
                    self._show_values(client, state, first, count, version_of(first))
            else:
                for bucket in ready:
                    self._send_values(client, state, bucket, version_of(bucket))

    def take_pull(self, client: Client, header: Header, state: PartitionState) -> None:
        """Note what a PULL requests; it replaces the client's earlier request."""
        client.wanted, client.exact = header.step, bool(header.flags & EXACT)
        with_frozen = bool(header.flags & WITH_FROZEN)
        client.pending_buckets = {
            span.bucket
            for span in state.spans
            if span.num_words and (with_frozen or state.layout.buckets[span.bucket].kind != "frozen")
        }

    def overwriting(self, bucket: int) -> None:
        """The bucket's values are about to change: copy what is still being sent of them."""
        for client in self.on("pull"):
            client.connection.detach(("values", bucket))

    def broadcast(self, clients: Iterable[Client], kind: FrameKind, step: int, body: bytes) -> None:
        for client in clients:
            client.connection.send(self._header(kind=kind, step=step), [body])

    def _show_values(self, client: Client, state: PartitionState, first: int, count: int, version: int) -> None:
        """Announce that `count` buckets from `first` on lie in shared memory."""
        self.pull_bytes += sum(state.published[bucket].nbytes for bucket in range(first, first + count))
        codec = _codec(state.published[first])
        flags = IN_MEMORY | (EXACT if client.exact else 0)
        header = self._header(
            kind=FrameKind.VALUES, step=version, bucket=first, node=TreeNode(first, count), flags=flags, codec=codec
        )
        client.connection.send(header)

    def _send_values(self, client: Client, state: PartitionState, bucket: int, version: int) -> None:
        values = state.values[bucket] if client.exact else state.published[bucket]
        body = as_bytes(values)
        self.pull_bytes += body.nbytes
        known, body_checksum = self._checksums.get(bucket, (None, 0))
        if known != (version, client.exact):  # one for all trainers
            body_checksum = checksum([body])
            self._checksums[bucket] = ((version, client.exact), body_checksum)
        flags = EXACT if client.exact else 0
        header = self._header(kind=FrameKind.VALUES, step=version, bucket=bucket, flags=flags, codec=_codec(values))
        client.connection.send(header, [body], tag=("values", bucket), body_checksum=body_checksum)

    def _send_ack(self, client: Client, of: Header | None, result: AckResult, open_bucket: int) -> None:
        """Acknowledge a frame, or (None) only send credit."""
        about = {"step": of.step, "bucket": of.bucket, "node": of.node} if of is not None else {}
        header = self._header(kind=FrameKind.ACK, flags=int(result), **about)
        client.announced_bytes = client.granted_bytes
        ack = Ack(of.kind if of is not None else None, client.granted_bytes, open_bucket)
        client.connection.send(header, [ack.pack()])


def _codec(words: torch.Tensor) -> Codec:
    return Codec.BF16 if words.dtype == torch.bfloat16 else Codec.FP32


def _runs(buckets: Sequence[int], alike: Callable[[int], object]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of neighbours among rising buckets that are alike."""
    keyed = ((bucket - place, alike(bucket), bucket) for place, bucket in enumerate(buckets))
    for _, group in itertools.groupby(keyed, key=lambda item: item[:2]):
        run = [bucket for *_, bucket in group]
        yield run[0], len(run)
