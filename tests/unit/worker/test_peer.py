"""A trainer's line to one partition: what it asks for when it greets, what it maps, and what it does not take."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness.played import JOB, Network, PlayedConnection, job_header, played_plan, played_spec
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import TreeNode
from pscluster.v1.plan_pb2 import PartitionPlacement, ProcessSpec
from pscluster.wire.frame import IN_MEMORY, FrameKind, Header
from pscluster.wire.memory import PAGE_BYTES, Lanes, Segment
from pscluster.wire.protocol import Hello, Welcome
from psworker.replica import BucketMemory
from psworker.staging import Staging
from psworker.trainer.gradients.send_queue import SharedLanes
from psworker.trainer.peer import Peer
from psworker.trainer.values import Values
from psworker.trainer.work import Agenda

LAYOUT = Layout((TensorSpec(names=("w",), shape=(16,), dtype="float32", kind="trained"),))
WORDS = bytes(range(64))


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Partition:
    """The other side, said by hand: welcomes each caller with `welcome` and the descriptors of its channel."""

    def __init__(self) -> None:
        self.welcome = Welcome(granted_bytes=100, open_bucket=-1, needs_values=False, num_lanes=2)
        self.fds: dict[str, list[int]] = {}
        self.hellos: list[Hello] = []
        self.callers: dict[str, PlayedConnection] = {}

    def share(self) -> tuple[Lanes, Segment]:
        """What it shares from now on, until the test is over."""
        lanes, segment = Lanes.create([64], 2), Segment.create(64, writable_by_others=False)
        segment.view[:64] = WORDS
        self.fds = {"push": [lanes.fd], "pull": [segment.fd]}
        return lanes, segment

    def body_target(self, connection: PlayedConnection, header: Header) -> memoryview:  # noqa: ARG002
        return memoryview(bytearray(header.length))

    def frame(self, connection: PlayedConnection, header: Header, body: memoryview) -> None:
        if header.kind is FrameKind.HELLO:
            hello = Hello.unpack(body)
            self.hellos.append(hello)
            self.callers[hello.channel] = connection
            fds = self.fds.get(hello.channel, [])
            connection.send(job_header(FrameKind.WELCOME), [self.welcome.pack()], fds=fds)

    def closed(self, connection: PlayedConnection, error: object) -> None: ...


class Trainer:
    """A peer, and what it works on."""

    def __init__(self, network: Network, address: str, transport: str) -> None:
        spec = played_spec(1)
        agenda = Agenda(ProcessSpec(job_id=JOB))
        agenda.adopt(played_plan(LAYOUT, {0: [0]}))
        self.shared = SharedLanes(spec, LAYOUT, Staging())
        self.memory = BucketMemory(LAYOUT)
        self.values = Values(spec, LAYOUT, self.memory, agenda.changed)
        placement = PartitionPlacement(addresses=[address])
        self.peer = Peer(network, agenda, self.shared, self.values, lambda *_: None, placement, transport)  # type: ignore[arg-type]

    @property
    def lanes(self) -> dict[int, Lanes]:
        return self.shared._lanes

    def close(self) -> None:
        """Hang up, and unmap what was mapped."""
        self.peer.close()
        self.peer.pushes.queue.lanes = None
        self.lanes.clear()
        self.values.restart()


@pytest.fixture(autouse=True)
def _nothing_else_is_freed() -> Iterator[None]:
    """Descriptors are counted: what earlier tests left must not go in the middle of one."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def partition(network: Network, tmp_path: Path) -> Partition:
    """Listens at a Unix path that exists, and over TCP."""
    made = Partition()
    (tmp_path / "s").touch()
    network.listeners = {f"{tmp_path}/s": made, "host:1": made}
    return made


def met(network: Network, tmp_path: Path, transport: str = "shm") -> Trainer:
    trainer = Trainer(network, "tcp:host:1" if transport == "tcp" else f"unix:{tmp_path}/s", transport)
    network.settle(redial=False)
    return trainer


@pytest.mark.parametrize(("transport", "asks"), [("tcp", False), ("unix", False), ("shm", True), ("auto", True)])
def test_to_share_memory_is_asked_for_where_it_is_wanted_and_can_be(
    transport: str, asks: bool, network: Network, partition: Partition, tmp_path: Path
) -> None:
    trainer = met(network, tmp_path, transport)

    assert [hello.share for hello in partition.hellos] == [asks, asks]
    assert trainer.peer.is_connected and trainer.lanes == {} and trainer.peer.pushes.queue.lanes is None
    assert trainer.peer.transport == ("tcp" if transport == "tcp" else "unix"), "the partition did not share"


def test_what_a_partition_shares_is_mapped_when_it_welcomes(
    network: Network, partition: Partition, tmp_path: Path
) -> None:
    lanes, _segment = partition.share()
    trainer = met(network, tmp_path)
    assert trainer.peer.transport == "shm"
    assert trainer.peer.pushes.queue.lanes is trainer.lanes[0]
    trainer.lanes[0].place(0, 1)[:] = WORDS
    assert bytes(lanes.place(0, 1)) == WORDS

    trainer.values.want(1, exact=False)
    partition.callers["pull"].send(job_header(FrameKind.VALUES, step=1, node=TreeNode(0, 1), flags=IN_MEMORY))
    network.settle()
    assert trainer.memory.flats[0].numpy().tobytes() == WORDS


def test_lanes_end_with_their_connection_and_the_next_brings_others(
    network: Network, partition: Partition, tmp_path: Path
) -> None:
    first, _segment = partition.share()
    trainer = met(network, tmp_path)
    old = trainer.lanes[0]
    partition.callers["push"].close()
    assert trainer.lanes == {}

    second, _other = partition.share()
    network.settle()
    assert trainer.peer.is_connected
    assert trainer.peer.pushes.queue.lanes is trainer.lanes[0] is not old
    trainer.lanes[0].place(0, 0)[:] = WORDS
    assert bytes(second.place(0, 0)) == WORDS and not any(first.place(0, 0))


def test_the_end_of_the_pulls_leaves_the_lanes_alone(network: Network, partition: Partition, tmp_path: Path) -> None:
    shared = partition.share()
    trainer = met(network, tmp_path)
    partition.callers["pull"].close()

    assert trainer.lanes and not trainer.peer.is_connected
    network.settle()
    assert trainer.peer.is_connected and shared


def test_a_thousand_welcomes_leave_no_descriptor(network: Network, partition: Partition, tmp_path: Path) -> None:
    shared = partition.share()
    trainer = met(network, tmp_path)
    before = num_descriptors()
    for _ in range(500):
        for channel in ("push", "pull"):
            partition.callers[channel].close()
        network.settle()

    assert trainer.peer.is_connected and trainer.peer.reconnects == 1000 and shared
    assert num_descriptors() == before


def test_a_peer_that_was_closed_meanwhile_takes_nothing(network: Network, partition: Partition, tmp_path: Path) -> None:
    """The welcomes are on their way, with their descriptors."""
    shared = partition.share()
    before = num_descriptors()
    trainer = Trainer(network, f"unix:{tmp_path}/s", "shm")
    while network.posted:
        network.posted.popleft()()
    for connection in [c for c in network.connections if c.handler is partition]:
        connection.deliver()
    assert num_descriptors() == before + 2
    trainer.peer.close()
    network.settle()

    assert trainer.lanes == {} and network.connections == [] and shared
    assert num_descriptors() == before


@pytest.mark.parametrize("channel", ["push", "pull"])
@pytest.mark.parametrize("what", ["too small", "not sealed", "a directory"])
def test_what_cannot_be_mapped_ends_the_connection_and_leaves_no_descriptor(
    what: str, channel: str, network: Network, partition: Partition, tmp_path: Path
) -> None:
    shared = partition.share()
    fd = os.open("/", os.O_RDONLY) if what == "a directory" else os.memfd_create("x", os.MFD_ALLOW_SEALING)
    if what == "not sealed":
        os.ftruncate(fd, 64 * PAGE_BYTES)
    partition.fds[channel] = [fd]
    before = num_descriptors()
    trainer = met(network, tmp_path)

    assert [error.code for error in network.refused] == ["PS-3002"]
    assert not trainer.peer.is_connected
    trainer.close()
    assert num_descriptors() == before and shared
    os.close(fd)


@pytest.mark.parametrize("channel", ["push", "pull"])
def test_a_descriptor_too_many_is_closed(channel: str, network: Network, partition: Partition, tmp_path: Path) -> None:
    shared = partition.share()
    before = num_descriptors()
    partition.fds[channel] = [*partition.fds[channel], partition.fds[channel][0]]
    met(network, tmp_path).close()

    assert num_descriptors() == before and shared


# ---- values that do not fit ----

VALUES = job_header(FrameKind.VALUES, step=1)
SHOWN = job_header(FrameKind.VALUES, step=1, node=TreeNode(0, 1), flags=IN_MEMORY)
WRONG: dict[str, tuple[str, Header, bytes]] = {
    "values where gradients go": ("push", VALUES, WORDS),
    "values in memory where gradients go": ("push", SHOWN, b""),
    "in memory, and a body": ("pull", SHOWN, WORDS),
    "neither in memory nor a body": ("pull", VALUES, b""),
    "no bucket": ("pull", replace(VALUES, bucket=1), WORDS),
    "no bucket, no body": ("pull", replace(VALUES, bucket=1), b""),
    "no bucket in memory": ("pull", replace(SHOWN, bucket=1, node=TreeNode(1, 1)), b""),
    "more buckets than there are": ("pull", replace(SHOWN, node=TreeNode(0, 2)), b""),
    "too short": ("pull", VALUES, WORDS[:-4]),
    "a gradient": ("pull", job_header(FrameKind.PUSH), WORDS),
    "an answer of another length": ("push", job_header(FrameKind.ACK), b"x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_ends_the_connection_and_lands_nowhere(
    name: str, network: Network, partition: Partition, tmp_path: Path
) -> None:
    shared = partition.share()
    trainer = met(network, tmp_path)
    trainer.values.want(1, exact=False)
    channel, header, body = WRONG[name]
    partition.callers[channel].send(header, [body])
    network.settle(redial=False)

    assert [error.code for error in network.refused] == ["PS-3002"]
    assert not trainer.values.landing.is_complete and shared
    assert not trainer.memory.flats[0].any()


def test_a_body_that_broke_off_is_not_made_whole_by_an_empty_one(
    network: Network, partition: Partition, tmp_path: Path
) -> None:
    trainer = met(network, tmp_path, "tcp")
    trainer.values.want(1, exact=False)
    header = replace(VALUES, length=64)
    target = trainer.values.target(0, header)
    assert target is not None
    target[:8] = b"\xff" * 8
    partition.callers["pull"].close()
    network.settle()
    partition.callers["pull"].send(VALUES)
    network.settle(redial=False)

    assert not trainer.values.landing.is_complete


def test_it_is_known_for_how_long_a_partition_took_no_connection(
    network: Network, partition: Partition, tmp_path: Path
) -> None:
    listening, network.listeners = network.listeners, {}
    trainer = met(network, tmp_path)
    assert trainer.peer.unreached_s(time.monotonic() + 7) >= 7
    network.listeners = listening
    network.settle()
    assert trainer.peer.is_connected and trainer.peer.unreached_s(time.monotonic() + 7) == 0
    network.listeners = {}
    partition.callers["pull"].close()
    network.settle()
    assert trainer.peer.unreached_s(time.monotonic() + 7) >= 7, "one of the two is not enough"
    trainer.close()


def test_a_partition_that_sends_callers_away_is_reached(network: Network, partition: Partition, tmp_path: Path) -> None:
    partition.frame = lambda connection, *_: connection.close()  # type: ignore[method-assign]
    trainer = met(network, tmp_path)
    before_s = time.monotonic()
    network.settle()
    assert not trainer.peer.is_connected
    now_s = time.monotonic()
    assert trainer.peer.unreached_s(now_s) <= now_s - before_s
    trainer.close()
