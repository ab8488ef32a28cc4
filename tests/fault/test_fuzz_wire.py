"""Bytes on data connections from strangers and from members that lie: every outcome is a value or a named error, soon,
in bounded memory."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable

import crc32c
import pytest

from harness.fuzz import fuzz
from harness.played import TOKEN, Network, filled, job_header
from harness.played_caller import LEAF, push
from pscluster.agent.link import FrameSplitter
from pscluster.errors import PsError
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import TreeNode
from pscluster.wire import frame
from pscluster.wire import partition_protocol as partitions
from pscluster.wire import protocol as trainers
from pscluster.wire.connection import Connection
from pscluster.wire.frame import FrameKind, Header
from psserver.partition.process import PartitionService

pytestmark = pytest.mark.timeout(60 + 3 * float(os.environ.get("PS_FUZZ_SECONDS") or 20))

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(16,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(16,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
    )
)


def framed(header: Header, body: bytes = b"") -> bytes:
    made = Header(**{**vars(header), "length": len(body), "checksum": crc32c.crc32c(body)})
    return frame.pack(made) + body


def hello(channel: trainers.Channel) -> bytes:
    made = trainers.Hello(token=TOKEN.hex(), role="trainer", channel=channel, attempt=0, restore_generation=1)
    return framed(job_header(FrameKind.HELLO, generation=1), made.pack())


def conversations() -> list[bytes]:
    """What real callers send, each on one connection."""
    ones, statistics = struct.pack("<16f", *[1.0] * 16), struct.pack("<3d", 1.0, 2.0, 3.0)
    digest = trainers.LeafDigest(loss_sum=1.0, weight=1.0, tensors={0: 7})
    at_leaf = {"generation": 1, "node": LEAF}
    pushed = [push(0), push(1), push(2), push(0, TreeNode(1, 1))]
    return [
        hello("push") + b"".join(framed(header, ones) for header in pushed),
        hello("push") + framed(job_header(FrameKind.STATISTICS, **at_leaf), statistics),
        hello("push") + framed(job_header(FrameKind.AUDIT, **at_leaf), digest.pack()),
        hello("push") + framed(job_header(FrameKind.OUTCOME, generation=1), trainers.Outcome(sha256="0" * 64).pack()),
        hello("pull") + framed(job_header(FrameKind.PULL, generation=1, step=0)),
        hello("vote") + framed(job_header(FrameKind.VOTE, generation=1), _vote()),
        hello("vote") + framed(job_header(FrameKind.JOIN, generation=1), _decision()),
    ]


def _vote() -> bytes:
    return partitions.Vote(generation=1, step=0, partition=0, squares={0: 2.0}).pack()


def _decision() -> bytes:
    return partitions.CommitDecision(generation=1, step=0, kind="commit").pack()


_FIELDS = struct.Struct("<4sHBBHHQQQIIIQI")
_LENGTH = 12  # places of fields
_CHECKSUM = 13


def with_checksums(data: bytes, _chance: random.Random) -> bytes:
    """As a caller that lies but counts well would send it: frames, each with the checksums of its content."""
    found, at = bytearray(data), 0
    while at + frame.HEADER_BYTES <= len(found):
        fields = list(_FIELDS.unpack_from(found, at))
        body_at = at + frame.HEADER_BYTES
        body = found[body_at : body_at + min(fields[_LENGTH], len(found) - body_at)]
        fields[_CHECKSUM] = crc32c.crc32c(bytes(body))
        head = _FIELDS.pack(*fields)
        found[at:body_at] = head + struct.pack("<I", crc32c.crc32c(head))
        at = body_at + len(body)
    return bytes(found)


class Listening:
    """A partition with real connections to it, each from a caller that sends and hangs up."""

    def __init__(self) -> None:
        self._served = 0
        self._start()

    def _start(self) -> None:
        self._network = Network()
        self.service: PartitionService = filled(self._network, LAYOUT, 2)

    def receive(self, data: bytes) -> None:
        """Everything that the partition does about these bytes. A connection that is refused is closed by name."""
        self._served += 1
        if self._served % 100 == 0:
            self._start()  # what was accepted has moved it on
        near, far = socket.socketpair()
        with near, far:
            far.setblocking(False)
            near.setblocking(False)
            near.send(data)
            near.shutdown(socket.SHUT_WR)
            connection = Connection(far, self.service.handler, lambda _: None)
            while connection.is_open and connection.reading:
                connection.readable()
                self._network.settle()
            connection.close()


def test_a_partition_refuses_by_name_what_it_receives() -> None:
    seeds = conversations()
    assert fuzz("frames", Listening().receive, seeds, with_checksums) > len(seeds)


HEADER = job_header(FrameKind.DIRECTIVE)
UNPACK: list[Callable[[bytes], object]] = [
    frame.unpack,
    trainers.Hello.unpack,
    trainers.Welcome.unpack,
    trainers.StandbyWelcome.unpack,
    trainers.Ack.unpack,
    lambda body: trainers.Directive.unpack(HEADER, body),
    trainers.Outcome.unpack,
    trainers.LeafDigest.unpack,
    trainers.unpack_statistics,
    lambda body: partitions.Vote.unpack(HEADER, body),
    partitions.CommitDecision.unpack,
    partitions.Join.unpack,
    partitions.Sync.unpack,
    partitions.Metadata.unpack,
]


def unpack_as_all(body: bytes) -> None:
    """Whatever kind it claims to be: the others refuse it, too."""
    for unpack in UNPACK:
        if unpack is frame.unpack and len(body) != frame.HEADER_BYTES:
            continue  # a connection reads just so many bytes
        try:
            unpack(body)
        except PsError:
            continue


def bodies() -> list[bytes]:
    metadata = partitions.Metadata(saved=3, evaluations=(partitions.Evaluation(2, {"loss": 1.5}),))
    decision = partitions.CommitDecision(generation=1, step=4, kind="commit", scale=0.5)
    welcome = trainers.Welcome(granted_bytes=1, open_bucket=0, needs_values=False, num_lanes=0)
    return [
        frame.pack(HEADER),
        hello("push")[frame.HEADER_BYTES :],
        welcome.pack(),
        trainers.StandbyWelcome(reach=1, applied=1).pack(),
        trainers.Ack(FrameKind.PUSH, 1 << 20, 3).pack(),
        trainers.Directive(1, 2, "train").pack(),
        trainers.Outcome(metrics={"accuracy": 0.5}).pack(),
        trainers.LeafDigest(loss_sum=1.0, weight=1.0, tensors={0: 7}).pack(),
        struct.pack("<3d", 1.0, 2.0, 3.0),
        _vote(),
        decision.pack(),
        metadata.pack(),
        partitions.Sync(update_counts=[1, 2], decision=decision, metadata=metadata).pack(),
    ]


def test_bodies_are_unpacked_or_refused() -> None:
    assert fuzz("bodies", unpack_as_all, bodies()) > len(UNPACK)


def test_what_a_trainer_reports_is_split_or_refused() -> None:
    def feed(data: bytes) -> None:
        splitter = FrameSplitter()
        for start in range(0, len(data), 1000):
            splitter.feed(data[start : start + 1000])

    message = b"\x0a\x03abc"
    assert fuzz("reports", feed, [struct.pack("<I", len(message)) + message] * 2) > 2
