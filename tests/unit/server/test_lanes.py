"""Gradients in shared memory at a partition: what a lane may say, when it is given back, what is summed in it."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

from harness.played import Network, filled, job_header, played_partition, played_plan, played_spec
from harness.played_caller import LEAF, NUM_LANES, Caller, push
from pscluster.step.codec import as_bytes
from pscluster.step.layout import BLOCK_WORDS, Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode
from pscluster.wire.frame import IN_MEMORY, SUMMARY, UNCHANGED, Codec, FrameKind, Header, in_lane
from psserver.partition.process import PartitionService

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(16,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(16,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
        TensorSpec(names=("fixed",), shape=(16,), dtype="float32", kind="frozen"),
    )
)
TRAINED, AVERAGED, CARRIED, FROZEN = range(4)
WEIGHT = struct.pack("<d", 1.0)


def words(value: float, codec: str = "fp32") -> bytes:
    return bytes(as_bytes(torch.full((16,), value, dtype=torch.bfloat16 if codec == "bf16" else torch.float32)))


def started(net: Network, shards: int = 2, **sections: Any) -> PartitionService:
    """A filled partition that takes plain steps of rate 1."""
    return filled(net, LAYOUT, shards, train={"optimizer": {"name": "sgd", "lr": 1.0}}, **sections)


def finish(caller: Caller, shards: int = 2) -> None:
    """Everything of the step but the gradients."""
    for shard in range(shards):
        caller.say(push(AVERAGED, TreeNode(shard, 1), flags=UNCHANGED), WEIGHT)
        summary = Summary(loss_sum=1, weight=1, samples=1, touched=b"\1")
        caller.say(push(SUMMARY, TreeNode(shard, 1)), summary.pack())
    caller.say(push(CARRIED, flags=UNCHANGED), WEIGHT)


def trained(service: PartitionService) -> list[float]:
    assert service.state is not None
    return sorted({float(value) for value in service.state.values[TRAINED]})


def untouched(service: PartitionService) -> bool:
    """Whether nothing is held and no version was made."""
    assert service.step is not None
    sums = (*service.step.trained.values(), *service.step.averaged.values(), *service.step.carried.values())
    return service.member.step == 0 and not any(s._held for s in (*sums, service.step.summary))  # type: ignore[attr-defined]


# ---- when a lane is given back ----


def test_a_lane_is_summed_in_and_given_back_when_it_was_read(network: Network) -> None:
    """The right side at once; the left one, which holds the sum, when the step is done."""
    service = started(network)
    caller = Caller(network, service, "push", local=True)
    assert caller.give(push(TRAINED, TreeNode(0, 1)), words(1.0)) == 0
    assert caller.taken(TRAINED) == [0]
    assert caller.give(push(TRAINED, TreeNode(1, 1)), words(2.0)) == 1

    assert caller.taken(TRAINED) == [0]
    assert caller.lanes is not None
    assert bytes(caller.lanes.place(TRAINED, 0)) == words(3.0), "no copy was made"
    assert service.step is not None and service.step.pool.allocated_bytes == 0
    finish(caller)
    assert service.version == 1
    assert caller.taken(TRAINED) == []
    assert trained(service) == [-1.5]


def test_duplicates_and_the_past_give_their_lane_back_at_once(network: Network) -> None:
    service = started(network)
    caller = Caller(network, service, "push", local=True)
    caller.give(push(TRAINED), words(1.0))
    for header in (push(TRAINED), push(TRAINED, TreeNode(1, 1), generation=0)):
        assert caller.give(header, words(7.0)) == 1
        assert caller.taken(TRAINED) == [0]

    assert caller.lanes is not None and bytes(caller.lanes.place(TRAINED, 0)) == words(1.0)


def test_what_a_greater_node_covers_gives_its_lane_back(network: Network) -> None:
    service = started(network)
    caller = Caller(network, service, "push", local=True)
    caller.give(push(TRAINED, TreeNode(1, 1)), words(100.0))
    caller.give(push(TRAINED, TreeNode(0, 2)), words(3.0))
    assert caller.taken(TRAINED) == [1]
    finish(caller)

    assert trained(service) == [-1.5]
    assert caller.taken(TRAINED) == []


def test_a_skipped_step_gives_every_lane_back(network: Network) -> None:
    service = started(network, on_nonfinite="skip")
    caller = Caller(network, service, "push", local=True)
    for shard in range(2):
        caller.give(push(TRAINED, TreeNode(shard, 1)), words(float("nan")))
    finish(caller)

    assert service.version == 1
    assert trained(service) == [0.0]
    assert caller.taken(TRAINED) == []


def test_without_a_free_lane_gradients_come_over_the_socket(network: Network) -> None:
    service = started(network, 8)
    caller = Caller(network, service, "push", local=True)
    shards = [0, 2, 4, 6, 1, 3, 5, 7]  # neighbours last: nothing is summed before
    lanes = [caller.give(push(TRAINED, TreeNode(shard, 1)), words(float(shard))) for shard in shards]

    assert lanes[:4] == [0, 1, None, None], "two lanes, all in use"
    assert None in lanes[4:]
    finish(caller, 8)
    assert service.version == 1
    assert trained(service) == [-28 / 8]
    assert caller.taken(TRAINED) == []
    assert service.step is not None
    pool = service.step.pool
    assert pool.allocated_bytes == 64 * len(pool._free[16])


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_trainers_near_and_far_add_up_to_one_sum(codec: str, network: Network) -> None:
    service = started(network, 4, network={"push_codec": codec})
    wire = Codec.of(codec)
    near, far = Caller(network, service, "push", local=True), Caller(network, service, "push", 1)
    for shard, caller in enumerate((near, far, far, near)):
        header = push(TRAINED, TreeNode(shard, 1), codec=wire, sender=caller.index)
        assert (caller.give(header, words(2.0**shard, codec)) is None) is (caller is far)
    finish(near, 4)

    assert service.version == 1
    assert trained(service) == [-15 / 4]
    assert near.taken(TRAINED) == []


def test_a_node_stays_when_its_trainer_goes(network: Network) -> None:
    """Its lane is nobody's any more: it is summed all the same, and a new connection has lanes of its own."""
    service = started(network)
    caller = Caller(network, service, "push", local=True)
    caller.give(push(TRAINED, TreeNode(0, 1)), words(1.0))
    lanes = caller.lanes
    caller.near.close()
    again = Caller(network, service, "push", local=True)
    assert again.taken(TRAINED) == []
    again.give(push(TRAINED, TreeNode(1, 1)), words(2.0))
    assert again.taken(TRAINED) == [], "it was added to the node that stayed"
    finish(again)

    assert trained(service) == [-1.5]
    assert lanes is not None and bytes(lanes.place(TRAINED, 0))


def test_a_resent_node_is_a_duplicate_whatever_its_lane_holds_by_then(network: Network) -> None:
    """The connection broke after the node was summed: what lies in its lane is another node's sum."""
    service = started(network)
    caller = Caller(network, service, "push", local=True)
    for shard in (0, 1):
        caller.give(push(TRAINED, TreeNode(shard, 1)), words(1.0 + shard))
    assert caller.lanes is not None
    left = bytes(caller.lanes.place(TRAINED, 0))
    caller.near.close()
    again = Caller(network, service, "push", local=True)
    again.say(push(TRAINED, TreeNode(0, 1)), left)
    finish(again)

    assert again.acks()[0].name == "DUPLICATE"
    assert trained(service) == [-1.5]


# ---- what does not fit ----

WRONG: dict[str, tuple[Header, bytes, str]] = {
    "a lane too high": (push(TRAINED, flags=in_lane(NUM_LANES)), b"", "flags"),
    "the highest lane": (push(TRAINED, flags=in_lane(255)), b"", "flags"),
    "buffers": (push(AVERAGED, flags=in_lane(0)), b"", "flags"),
    "integer buffers": (push(CARRIED, flags=in_lane(0)), b"", "flags"),
    "what never changes": (push(FROZEN, flags=in_lane(0)), b"", "node"),
    "no bucket": (push(9, flags=in_lane(0)), b"", "bucket"),
    "no node": (push(TRAINED, TreeNode(0, 3), flags=in_lane(0)), b"", "node"),
    "a summary": (push(SUMMARY, flags=in_lane(0)), b"", "length"),
    "first values": (job_header(FrameKind.INIT, bucket=TRAINED, node=LEAF, flags=in_lane(0)), b"", "flags"),
    "another codec": (push(TRAINED, flags=in_lane(0), codec=Codec.BF16), b"", "codec"),
    "a body, too": (push(TRAINED, flags=in_lane(0)), words(1.0), "length"),
    "unchanged gradients": (push(TRAINED, flags=in_lane(0) | UNCHANGED), WEIGHT, "node"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_lane_that_does_not_fit_is_cut_off_by_name_and_changes_nothing(name: str, network: Network) -> None:
    service = started(network)
    caller = Caller(network, service, "push", local=True)
    bystander = Caller(network, service, "push", local=True)
    assert caller.lanes is not None and caller.lanes.take(TRAINED) == 0
    header, body, field = WRONG[name]

    caller.say(header, body)

    assert not caller.near.is_open
    assert caller.far.error is not None and caller.far.error.details["field"] == field
    assert service.counters.invalid == {caller.far.error.code: 1}
    assert untouched(service)
    assert caller.taken(TRAINED) == [0], "what was refused is not given back"
    assert bystander.near.is_open


def test_a_lane_where_no_memory_is_shared_is_refused(network: Network) -> None:
    service = started(network)
    for caller in (Caller(network, service, "push"), Caller(network, service), Caller(network, service)):
        caller.greet("push", share=False)
        caller.say(push(TRAINED, flags=in_lane(0)))
        assert not caller.near.is_open
    assert untouched(service)


def test_a_lane_on_a_connection_for_pulls_is_refused(network: Network) -> None:
    service = started(network)
    caller = Caller(network, service, "pull", local=True)
    caller.say(push(TRAINED, flags=IN_MEMORY))

    assert not caller.near.is_open
    assert untouched(service)


@pytest.mark.parametrize("num_lanes", [None, 0, -1, 9, 2**70, 1.5, "2", [2]])
def test_a_hello_for_an_invalid_number_of_lanes_is_refused(num_lanes: object, network: Network) -> None:
    service = started(network)
    caller = Caller(network, service, local=True)
    caller.greet("push", share=True, num_lanes=num_lanes)

    assert not caller.near.is_open
    assert caller.far.error is not None and caller.far.error.details["field"] == "body"
    assert caller.lanes is None


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_no_memory_is_shared_where_the_job_does_not_want_it(transport: str, network: Network) -> None:
    service = started(network, network={"transport": transport})
    pusher, puller = (Caller(network, service, channel, local=True) for channel in ("push", "pull"))

    assert pusher.near.is_open and puller.near.is_open
    assert pusher.lanes is None and puller.segment is None


def test_no_memory_is_shared_with_who_is_not_on_this_host(network: Network) -> None:
    service = started(network)
    caller = Caller(network, service, local=False)
    caller.greet("push", share=True)

    assert caller.near.is_open and caller.lanes is None


ELSEWHERE = Layout(
    (
        TensorSpec(names=("w",), shape=(BLOCK_WORDS,), dtype="float32", kind="trained"),
        TensorSpec(names=("b",), shape=(1,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(1,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
    )
)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("flags", "body"), [(0, b""), (in_lane(0), b""), (UNCHANGED, WEIGHT)], ids=["empty", "in a lane", "unchanged"]
)
def test_words_of_a_bucket_that_lies_elsewhere_are_refused(
    index: int, flags: int, body: bytes, network: Network
) -> None:
    """This partition holds no word of the bucket: an empty body is of the right length, and still not wanted."""
    service = played_partition(network, played_spec(1, 2), index)
    service.adopt(played_plan(ELSEWHERE, {0: [0]}, partitions=2))
    assert service.state is not None
    empty = [span.bucket for span in service.state.spans if not span.num_words]
    assert empty
    for number, bucket in enumerate(empty):
        caller = Caller(network, service, "push", local=True)
        caller.say(push(bucket, flags=flags), body)
        assert not caller.near.is_open
        assert sum(service.counters.invalid.values()) == number + 1
