"""What a partition answers to a PULL: rounded or exact, over the socket or where both sides can read it."""

from __future__ import annotations

import struct

import pytest
import torch

import pscluster.step.layout
from harness.played import Network, fill, filled, job_header, started
from harness.played_caller import Caller
from pscluster.step.codec import DTYPES
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import TreeNode
from pscluster.wire.frame import EXACT, IN_MEMORY, WITH_FROZEN, Codec, FrameKind
from pscluster.wire.memory import page_offsets
from psserver.partition.actions import ServePulls
from psserver.partition.process import PartitionService

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(16,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(16,), dtype="float32", kind="averaged"),
        TensorSpec(names=("fixed",), shape=(16,), dtype="float32", kind="frozen"),
    )
)
TRAINED, AVERAGED, FROZEN = range(3)
THIRD = 1 / 3
EXACT_BYTES = struct.pack("<16f", *[THIRD] * 16)


def thirds(net: Network, codec: str) -> PartitionService:
    """A partition whose every value is a third."""
    service = started(net, LAYOUT, network={"pull_codec": codec})
    assert service.state is not None
    for values in service.state.values:
        values.view(torch.float32).fill_(THIRD)
    fill(service)
    return service


def words_of(caller: Caller, service: PartitionService, bucket: int) -> bytes:
    """A bucket's words where the frame says that they are."""
    header, body = caller.values[bucket]
    if not header.flags & IN_MEMORY:
        return body
    assert service.state is not None and caller.segment is not None and body == b""
    codec = service.spec.network.pull_codec
    sizes = [LAYOUT.wire_bytes(span, codec) for span in service.state.spans]
    offsets, _ = page_offsets(sizes)
    return bytes(caller.segment.view[offsets[bucket] : offsets[bucket] + sizes[bucket]])


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("local", [False, True], ids=["remote", "local"])
@pytest.mark.parametrize("exact", [False, True], ids=["as pulled", "exact"])
def test_values_come_in_the_codec_and_by_the_shortest_way(
    exact: bool, local: bool, codec: str, network: Network
) -> None:
    service = thirds(network, codec)
    caller = Caller(network, service, "pull", local=local)
    caller.say(job_header(FrameKind.PULL, generation=1, flags=WITH_FROZEN | (EXACT if exact else 0)))

    answer = {bucket: header for bucket, (header, _) in caller.values.items()}
    assert sorted(answer) == [TRAINED, AVERAGED, FROZEN]
    narrow = codec == "bf16" and not exact
    assert {bucket: header.codec for bucket, header in answer.items()} == {
        TRAINED: Codec.BF16 if narrow else Codec.FP32, AVERAGED: Codec.FP32, FROZEN: Codec.FP32,
    }  # fmt: skip
    assert all(bool(header.flags & EXACT) is exact for header in answer.values())
    shared = {bucket for bucket, header in answer.items() if header.flags & IN_MEMORY}
    in_memory = local and not (exact and codec == "bf16")  # only the rounded ones lie in shared memory
    assert shared == ({TRAINED, AVERAGED, FROZEN} if in_memory else set())
    rounded = torch.full((16,), THIRD).to(DTYPES["bf16"]).view(torch.int16).numpy().tobytes()
    assert words_of(caller, service, TRAINED) == (rounded if narrow else EXACT_BYTES)
    assert words_of(caller, service, AVERAGED) == words_of(caller, service, FROZEN) == EXACT_BYTES


def test_the_last_pull_says_whether_values_are_exact(network: Network) -> None:
    service = thirds(network, "bf16")
    caller = Caller(network, service, "pull")
    for flags in (EXACT, 0):
        caller.values.clear()
        caller.say(job_header(FrameKind.PULL, generation=1, flags=flags))
        assert {header.flags & EXACT for header, _ in caller.values.values()} == {flags}


@pytest.mark.parametrize("local", [False, True], ids=["remote", "local"])
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_first_values_are_exact_whatever_the_codec_and_published_at_once(
    codec: str, local: bool, network: Network
) -> None:
    service = started(network, LAYOUT, network={"pull_codec": codec})
    pusher = Caller(network, service, "push", local=local)
    for bucket in (TRAINED, AVERAGED, FROZEN):
        pusher.say(job_header(FrameKind.INIT, generation=1, bucket=bucket, node=TreeNode(0, 1)), EXACT_BYTES)
    caller = Caller(network, service, "pull", local=local)
    caller.say(job_header(FrameKind.PULL, generation=1))

    assert service.state is not None and service.state.is_filled
    assert service.state.values[TRAINED].tolist() == [torch.tensor(THIRD).item()] * 16
    rounded = torch.full((16,), THIRD).to(DTYPES[service.spec.network.pull_codec])
    assert words_of(caller, service, TRAINED) == rounded.view(torch.uint8).numpy().tobytes()


def test_who_maps_the_memory_sees_the_next_version_without_another_byte(network: Network) -> None:
    service = thirds(network, "fp32")
    caller = Caller(network, service, "pull", local=True)
    caller.say(job_header(FrameKind.PULL, generation=1))
    before = service.clients.pull_bytes
    assert service.state is not None
    service.state.values[TRAINED].fill_(7.0)

    assert words_of(caller, service, TRAINED) == struct.pack("<16f", *[7.0] * 16)
    assert service.clients.pull_bytes == before == 128, "counted where it lies"


# ---- runs of buckets ----


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch, network: Network) -> PartitionService:
    """A partition of five trained buckets, rounded when they are pulled, and one of buffers."""
    monkeypatch.setattr(pscluster.step.layout, "BUCKET_WORDS", 16)
    trained = [TensorSpec(names=(f"w{n}",), shape=(16,), dtype="float32", kind="trained") for n in range(5)]
    layout = Layout((*trained, TensorSpec(names=("mean",), shape=(16,), dtype="float32", kind="averaged")))
    assert len(layout.buckets) == 6
    return filled(network, layout, network={"pull_codec": "bf16"})


def runs(caller: Caller) -> list[tuple[int, int, int]]:
    """First bucket, how many, and version of each frame of values; then forgets them."""
    found = [(h.bucket, h.node.leaves, h.step) for h, _ in caller.received if h.kind is FrameKind.VALUES]
    assert all(
        h.node.first == h.bucket for h, _ in caller.received if h.kind is FrameKind.VALUES and h.flags & IN_MEMORY
    )
    caller.received.clear()
    return found


def test_of_neighbours_in_shared_memory_one_frame_tells(network: Network, many: PartitionService) -> None:
    """What is of another version or codec, or not ready yet, has a frame of its own."""
    caller = Caller(network, many, "pull", local=True)
    caller.say(job_header(FrameKind.PULL, generation=1))
    assert runs(caller) == [(0, 5, 0), (5, 1, 0)]

    many.machine.versions |= {0: 1, 1: 1, 3: 1, 4: 2}
    caller.say(job_header(FrameKind.PULL, generation=1, step=1))
    assert runs(caller) == [(0, 2, 1), (3, 1, 1), (4, 1, 2)]
    many.machine.versions |= {2: 1, 5: 1}
    many.carry_out([ServePulls()])
    network.settle()
    assert runs(caller) == [(2, 1, 1), (5, 1, 1)]
    many.carry_out([ServePulls()])
    network.settle()
    assert runs(caller) == [], "each once"


def test_over_a_socket_each_bucket_has_its_frame_and_a_checksum_of_its_newest_values(
    network: Network, many: PartitionService
) -> None:
    """One for all who pull, by version and exactness; the played connection compares it with what is sent."""
    assert many.state is not None
    callers = [Caller(network, many, "pull", index) for index in range(2)]
    for version in range(3):
        for bucket, values in enumerate(many.state.values):
            values.fill_(version + 1 / 3)
            many.state.publish(bucket)
        many.machine.version, many.machine.versions = version, dict.fromkeys(many.machine.versions, version)
        for caller in callers:
            for flags in (0, EXACT, 0):
                caller.say(job_header(FrameKind.PULL, generation=1, step=version, sender=caller.index, flags=flags))
                assert runs(caller) == [(bucket, 0, version) for bucket in range(6)]
    assert network.refused == []
