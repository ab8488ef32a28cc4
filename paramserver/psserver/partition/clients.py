"""Who is connected to a partition, and what it is owed: trainers' credit and pulls."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pscluster.tree import Node
from pscluster.wire.connection import Connection
from pscluster.wire.frame import WITH_FROZEN, AckResult, Header, Kind
from psserver.partition.state import PartitionState, as_bytes

ACK_BODY = struct.Struct("<BQI")  # kind acknowledged (0: credit alone), granted bytes, open bucket
NO_BUCKET = 0xFFFF_FFFF


@dataclass(eq=False)
class Client:
    """One accepted connection. `channel`: a trainer's "push" or "pull", a partition's "vote", "" before HELLO."""

    connection: Connection
    channel: str = ""
    index: int = -1  # rank, or partition index
    granted_bytes: int = 0
    wanted: int = -1  # version asked for by PULL
    owed_buckets: set[int] = field(default_factory=set)
    landing: object = None  # what the body being received is for
    scratch: bytearray = field(default_factory=bytearray)

    def discard(self, length: int) -> memoryview:
        """Memory for a body that nobody wants; its content is garbage afterwards."""
        if len(self.scratch) < length:
            self.scratch = bytearray(length)
        return memoryview(self.scratch)[:length]


class Clients:
    """The trainers' and partitions' connections. On the partition's thread."""

    def __init__(self, header: Callable[..., Header]) -> None:
        self._header = header  # makes a header of this job, generation and sender
        self._by_connection: dict[Connection, Client] = {}
        self.pull_bytes = 0
        self._open_bucket = -1  # that every trainer was told of

    def of(self, connection: Connection) -> Client:
        """The client of a connection, made when it is first heard of."""
        client = self._by_connection.get(connection)
        if client is None:
            client = self._by_connection[connection] = Client(connection)
        return client

    def on(self, channel: str) -> list[Client]:
        """Every greeted client of one channel, by index."""
        found = (c for c in self._by_connection.values() if c.channel == channel and c.connection.is_open)
        return sorted(found, key=lambda client: client.index)

    def forget(self, connection: Connection) -> None:
        self._by_connection.pop(connection, None)

    def close_all(self) -> None:
        """Close every connection: another timeline begins, and each must greet again."""
        for connection in list(self._by_connection):
            connection.close()

    def acknowledge(self, client: Client, header: Header, result: AckResult, open_bucket: int) -> None:
        """Tell a trainer that a frame arrived, and how much it may send.

        When a PUSH opened another bucket, all are told: one that has used up its credit waits for just that."""
        self._send_ack(client, header.kind, header.step, header.bucket, header.node, result, open_bucket)
        if header.kind is Kind.PUSH and open_bucket != self._open_bucket:
            self._open_bucket = open_bucket
            for other in self.on("push"):
                if other is not client:
                    self._send_ack(other, 0, 0, 0, Node(0, 0), AckResult.APPLIED, open_bucket)

    def credit(self, owner: object, size_bytes: int, open_bucket: int) -> None:
        """Memory of a client's node is free again."""
        if isinstance(owner, Client) and size_bytes and owner.connection.is_open:
            owner.granted_bytes += size_bytes
            self._send_ack(owner, 0, 0, 0, Node(0, 0), AckResult.APPLIED, open_bucket)

    def serve_pulls(self, state: PartitionState, version_of: Callable[[int], int]) -> None:
        """Send every owed bucket whose version is new enough, first-needed first."""
        for client in self.on("pull"):
            for bucket in sorted(client.owed_buckets):
                if version_of(bucket) >= client.wanted:
                    client.owed_buckets.discard(bucket)
                    self._send_values(client, state, bucket, version_of(bucket))

    def take_pull(self, client: Client, header: Header, state: PartitionState) -> None:
        """Remember what a PULL asks for; it replaces what the client asked for before."""
        client.wanted = header.step
        with_frozen = bool(header.flags & WITH_FROZEN)
        client.owed_buckets = {
            span.bucket
            for span in state.spans
            if span.num_words and (with_frozen or state.layout.buckets[span.bucket].kind != "frozen")
        }

    def overwriting(self, bucket: int) -> None:
        """The bucket's values are about to change: whoever still reads them gets a copy."""
        for client in self.on("pull"):
            client.connection.detach(("values", bucket))

    def broadcast(self, clients: Iterable[Client], kind: Kind, step: int, body: bytes) -> None:
        for client in clients:
            client.connection.send(self._header(kind=kind, step=step), [body])

    def _send_values(self, client: Client, state: PartitionState, bucket: int, version: int) -> None:
        body = as_bytes(state.values[bucket])
        self.pull_bytes += body.nbytes
        header = self._header(kind=Kind.VALUES, step=version, bucket=bucket)
        client.connection.send(header, [body], tag=("values", bucket))

    def _send_ack(
        self, client: Client, kind: int, step: int, bucket: int, node: Node, result: AckResult, open_bucket: int
    ) -> None:
        header = self._header(kind=Kind.ACK, step=step, bucket=bucket, node=node, flags=int(result))
        told = open_bucket if open_bucket >= 0 else NO_BUCKET
        client.connection.send(header, [ACK_BODY.pack(kind, client.granted_bytes, told)])
