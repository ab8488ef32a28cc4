"""The other end of a connection to a played partition, for tests that say each frame themselves."""

from __future__ import annotations

from typing import Any

from harness.played import TOKEN, Network, PlayedConnection, job_header
from pscluster.step.tree import TreeNode
from pscluster.wire.frame import IN_MEMORY, AckResult, FrameKind, Header, in_lane
from pscluster.wire.memory import Lanes, Segment
from pscluster.wire.protocol import Hello, Welcome
from psserver.partition.process import PartitionService

LEAF = TreeNode(0, 1)
NUM_LANES = 2


def push(bucket: int, node: TreeNode = LEAF, **fields: Any) -> Header:
    """The header of a PUSH in generation 1."""
    return job_header(FrameKind.PUSH, **{"generation": 1, "bucket": bucket, "node": node, **fields})


class Caller:
    """Keeps what it is told. A `local` one asks to share memory when it greets, and maps what it gets."""

    def __init__(
        self, network: Network, service: PartitionService, channel: str = "", index: int = 0, *, local: bool = False
    ) -> None:
        self.received: list[tuple[Header, bytes]] = []
        self.values: dict[int, tuple[Header, bytes]] = {}  # by bucket: the frame that said the newest
        self.network = network
        self.service = service
        self.index = index
        self.local = local
        self.channel = channel
        self.lanes: Lanes | None = None
        self.segment: Segment | None = None
        self.near, self.far = network.connect(self, service.handler, local=local)
        if channel:
            self.greet(channel)

    def greet(self, channel: str, **fields: Any) -> None:
        made: dict[str, Any] = {"channel": channel, "attempt": 0, "restore_generation": 1, **fields}
        hello = Hello(token=TOKEN.hex(), role="trainer", **{"share": self.local, "num_lanes": NUM_LANES, **made})
        self.say(job_header(FrameKind.HELLO, generation=1, sender=self.index), hello.pack())

    def say(self, header: Header, body: bytes = b"") -> None:
        self.near.send(header, [body])
        self.network.settle()

    def give(self, header: Header, words: bytes) -> int | None:
        """Push a gradient by the way that a trainer takes: through a lane if there is a free one, whose number is
        returned."""
        lane = self.lanes.take(header.bucket) if self.lanes is not None else None
        if lane is None:
            self.say(header, words)
        else:
            self.fill(header.bucket, lane, words)
            self.say(Header(**{**vars(header), "flags": in_lane(lane)}))
        return lane

    def fill(self, bucket: int, lane: int, words: bytes) -> None:
        assert self.lanes is not None
        self.lanes.place(bucket, lane)[:] = words

    def taken(self, bucket: int) -> list[int]:
        """The lanes of a bucket that are in use."""
        assert self.lanes is not None
        first = bucket * self.lanes.num_lanes
        return [lane for lane in range(self.lanes.num_lanes) if self.lanes._taken[first + lane]]

    def body_target(self, connection: PlayedConnection, header: Header) -> memoryview:  # noqa: ARG002
        return memoryview(bytearray(header.length))

    def frame(self, connection: PlayedConnection, header: Header, body: memoryview) -> None:
        self.received.append((header, bytes(body)))
        if header.kind is FrameKind.VALUES:
            run = header.node if header.flags & IN_MEMORY else TreeNode(header.bucket, 1)
            self.values |= {bucket: (header, bytes(body)) for bucket in range(run.first, run.first + run.leaves)}
        if header.kind is FrameKind.WELCOME:
            self._welcomed(connection.take_fds(), Welcome.unpack(body))

    def closed(self, connection: PlayedConnection, error: object) -> None:
        """Seen in `near.is_open`."""

    @property
    def granted(self) -> int:
        """The credit that it was welcomed with."""
        return next(Welcome.unpack(body).granted_bytes for h, body in self.received if h.kind is FrameKind.WELCOME)

    def kinds(self) -> list[FrameKind]:
        return [header.kind for header, _ in self.received]

    def acks(self) -> list[AckResult]:
        """What became of what was sent."""
        return [AckResult(header.flags) for header, body in self.received if header.kind is FrameKind.ACK and body[0]]

    def _welcomed(self, fds: list[int], welcome: Welcome) -> None:
        state, network = self.service.state, self.service.spec.network
        assert state is not None
        if fds and self.channel == "pull":
            self.segment = Segment.open(fds[0], 1, writable=False)
        elif fds:
            sizes = state.layout.gradient_bytes(state.spans, network.push_codec)
            self.lanes = Lanes.open(fds[0], sizes, welcome.num_lanes)
