"""What arrives at a partition: what does not fit is cut off by name, counted, and changes nothing."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest

import psserver.partition.ingress.handshake
from harness.played import JOB, TOKEN, Network, filled, job_header, played_plan
from harness.played_caller import LEAF, Caller, push
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode
from pscluster.wire.frame import SUMMARY, UNCHANGED, AckResult, Codec, FrameKind, Header, job_number
from pscluster.wire.protocol import Ack, Directive
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
ONES = struct.pack("<16f", *[1.0] * 16)
WEIGHT = struct.pack("<d", 1.0)


@pytest.fixture
def service(network: Network) -> PartitionService:
    """A partition of two shards, filled, in generation 1."""
    return filled(network, LAYOUT, 2)


@pytest.fixture(params=["remote", "local"])
def local(request: pytest.FixtureRequest) -> bool:
    """Whether callers share memory with the partition."""
    return bool(request.param == "local")


def untouched(service: PartitionService) -> bool:
    """Whether nothing is held and no version was made."""
    assert service.step is not None
    sums = (*service.step.trained.values(), *service.step.averaged.values(), service.step.summary)
    return service.member.step == 0 and not any(s._held for s in sums)  # type: ignore[attr-defined]


# ---- what does not fit ----

WRONG_PUSHES: dict[str, tuple[Header, bytes]] = {
    "another job": (push(TRAINED, job=job_number("other")), ONES),
    "no such bucket": (push(9), ONES),
    "a bucket that never changes": (push(FROZEN), ONES),
    "too short": (push(TRAINED), ONES[:-4]),
    "too long": (push(TRAINED), ONES + ONES),
    "no node of the tree": (push(TRAINED, TreeNode(0, 3)), ONES),
    "no leaf": (push(TRAINED, TreeNode(2, 1)), ONES),
    "the empty node": (push(TRAINED, TreeNode(0, 0)), ONES),
    "a carried bucket from shard 1": (push(CARRIED, TreeNode(1, 1)), bytes(64)),
    "unchanged gradients": (push(TRAINED, flags=UNCHANGED), WEIGHT),
    "a weight of another length": (push(AVERAGED, flags=UNCHANGED), WEIGHT + b"\0"),
    "a summary of another length": (push(SUMMARY), bytes(24)),
    "a pull with a body": (job_header(FrameKind.PULL), b"x"),
    "a vote from a trainer": (job_header(FrameKind.VOTE), b"\1"),
    "an audit without a role": (job_header(FrameKind.AUDIT, bucket=3, node=LEAF), bytes(16)),
    "an audit of no leaf": (job_header(FrameKind.AUDIT, node=TreeNode(0, 2)), bytes(16)),
    "an audit of more tensors than there are": (job_header(FrameKind.AUDIT, node=LEAF), bytes(16 + 8 * 5)),
    "a request for a digest": (job_header(FrameKind.ARBITRATE, node=LEAF), b"x"),
    "a decision": (job_header(FrameKind.DECISION), b"{}"),
    "a second greeting": (job_header(FrameKind.HELLO), b"{}"),
    "huge statistics": (job_header(FrameKind.STATISTICS), bytes((1 << 20) + 8)),
    "half a number": (job_header(FrameKind.STATISTICS, node=LEAF), bytes(7)),
    "statistics of no node": (job_header(FrameKind.STATISTICS, node=TreeNode(0, 3)), WEIGHT),
    "an outcome that is no JSON": (job_header(FrameKind.OUTCOME), b"{"),
    "an outcome that is no mapping": (job_header(FrameKind.OUTCOME), b"[]"),
    "no outcome": (job_header(FrameKind.OUTCOME), b""),
    "first values of no bucket": (job_header(FrameKind.INIT, bucket=9, node=LEAF), ONES),
    "first values too short": (job_header(FrameKind.INIT, bucket=TRAINED, node=LEAF), ONES[:-4]),
    "empty: gradients": (push(TRAINED), b""),
    "empty: gradients of no bucket": (push(9), b""),
    "empty: buffers": (push(AVERAGED), b""),
    "empty: a weight": (push(AVERAGED, flags=UNCHANGED), b""),
    "empty: a summary": (push(SUMMARY), b""),
    "empty: first values": (job_header(FrameKind.INIT, bucket=TRAINED, node=LEAF), b""),
    "empty: first values of no bucket": (job_header(FrameKind.INIT, bucket=9, node=LEAF), b""),
    "gradients in another codec": (push(TRAINED, codec=Codec.BF16), ONES),
    "half as long in another codec": (push(TRAINED, codec=Codec.BF16), ONES[:32]),
    "buffers in a codec": (push(AVERAGED, codec=Codec.BF16), ONES),
    "first values in a codec": (job_header(FrameKind.INIT, bucket=TRAINED, node=LEAF, codec=Codec.BF16), ONES),
    "a summary of no node": (
        push(SUMMARY, TreeNode(5, 1)),
        Summary(loss_sum=1, weight=1, samples=1, touched=b"\0").pack(),
    ),
}


@pytest.mark.parametrize("name", WRONG_PUSHES)
def test_a_frame_that_does_not_fit_is_cut_off_and_counted(
    name: str, local: bool, network: Network, service: PartitionService
) -> None:
    caller = Caller(network, service, "push", local=local)
    bystander = Caller(network, service, "pull", local=local)
    header, body = WRONG_PUSHES[name]

    caller.say(header, body)

    assert not caller.near.is_open
    assert caller.far.error is not None
    assert service.counters.invalid == {caller.far.error.code: 1}
    assert untouched(service)
    assert bystander.near.is_open


WRONG_GREETINGS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"\xff\xfe",
    "no mapping": b"[1]",
    "no token": b"{}",
    "a wrong token": json.dumps({"token": "0" * 32, "channel": "push", "restore_generation": 1}).encode(),
    "a token that is no ASCII": json.dumps({"token": "é", "channel": "push"}).encode(),
    "a token that is no text": b'{"token": "\\ud800", "channel": "push"}',
    "a token of another type": json.dumps({"token": [1], "channel": "push"}).encode(),
    "a channel of no kind": json.dumps({"token": TOKEN.hex(), "channel": "x", "restore_generation": 1}).encode(),
    "a restore generation that is no number": json.dumps({"token": TOKEN.hex(), "restore_generation": "x"}).encode(),
    "another cluster": json.dumps(
        {
            "token": TOKEN.hex(),
            "role": "trainer",
            "channel": "push",
            "attempt": 0,
            "restore_generation": 1,
            "cluster": "0123456789abcdef",
        }
    ).encode(),
    "too much": b" " * 5000,
    "too deep": b"[" * 4000,
}


@pytest.mark.parametrize("name", WRONG_GREETINGS)
def test_a_hello_that_does_not_fit_is_refused(name: str, network: Network, service: PartitionService) -> None:
    caller = Caller(network, service)

    caller.say(job_header(FrameKind.HELLO, generation=1), WRONG_GREETINGS[name])

    assert not caller.near.is_open
    assert caller.received == []
    assert sum(service.counters.invalid.values()) == 1


@pytest.mark.parametrize("kind", [k for k in FrameKind if k is not FrameKind.HELLO])
def test_no_frame_is_taken_before_the_hello(kind: FrameKind, network: Network, service: PartitionService) -> None:
    for body in (b"", WEIGHT):
        caller = Caller(network, service)
        caller.say(job_header(kind, generation=1), body)
        assert not caller.near.is_open
    assert service.counters.invalid == {"PS-1005": 2}
    assert untouched(service)


def test_a_caller_of_an_older_restore_is_fenced_with_the_newer_generation(
    network: Network, service: PartitionService
) -> None:
    service.adopt(played_plan(LAYOUT, {0: [0, 1]}, generation=5, restore_generation=5))
    caller = Caller(network, service)
    sent: list[Header] = []

    def send(header: Header, body: object = (), **_: object) -> None:  # noqa: ARG001 - closing drops what waits
        sent.append(header)

    caller.far.send = send  # type: ignore[method-assign,assignment]

    caller.greet("push", restore_generation=1)

    assert [header.kind for header in sent] == [FrameKind.FENCED]
    assert not caller.near.is_open
    assert service.counters.fenced == 1


# ---- what fits ----


def test_a_push_is_applied_once_and_duplicates_and_the_past_are_told(
    local: bool, network: Network, service: PartitionService
) -> None:
    caller = Caller(network, service, "push", local=local)
    caller.give(push(TRAINED), ONES)
    caller.give(push(TRAINED), ONES)
    caller.give(push(TRAINED, generation=0), ONES)
    caller.give(push(TRAINED, generation=0, node=TreeNode(1, 1)), ONES)

    results = [AckResult.APPLIED, AckResult.DUPLICATE, AckResult.STALE, AckResult.STALE]
    assert caller.acks() == ([] if local else results), "what lies in a lane needs no answer"
    assert service.counters._pushes == {result: results.count(result) for result in AckResult}
    assert service.counters._push_bytes == 4 * len(ONES)
    assert caller.near.is_open


def test_credit_comes_back_for_everything_that_is_not_kept(network: Network, service: PartitionService) -> None:
    caller = Caller(network, service, "push")
    client = service.clients.of(caller.far)  # type: ignore[arg-type]
    granted = client.granted_bytes
    caller.say(push(TRAINED), ONES)
    assert client.granted_bytes == granted
    for header, body in [
        (push(TRAINED), ONES),
        (push(TRAINED, generation=0), ONES),
        (push(AVERAGED, flags=UNCHANGED), WEIGHT),
        (push(SUMMARY), Summary(loss_sum=1, weight=1, samples=1, touched=b"\1").pack()),
    ]:
        granted += len(body)
        caller.say(header, body)
        assert client.granted_bytes == granted


def test_a_job_of_narrow_gradients_takes_no_others(network: Network) -> None:
    service = filled(network, LAYOUT, 2, network={"push_codec": "bf16"})
    for header, body in [
        (push(TRAINED), ONES),
        (push(TRAINED), ONES[:32]),
        (push(TRAINED, codec=Codec.BF16), ONES),
        (push(AVERAGED, codec=Codec.BF16), ONES[:32]),
    ]:
        caller = Caller(network, service, "push")
        caller.say(header, body)
        assert not caller.near.is_open
    assert untouched(service)
    caller = Caller(network, service, "push")
    caller.say(push(TRAINED, codec=Codec.BF16), ONES[:32])
    caller.say(push(AVERAGED), ONES)
    assert caller.acks() == [AckResult.APPLIED] * 2


def told_credit(caller: Caller) -> list[tuple[int, int]]:
    """What it was told of its credit beside answers: bytes granted, and the open bucket."""
    bodies = [Ack.unpack(body) for header, body in caller.received if header.kind is FrameKind.ACK]
    return [(granted, bucket) for kind, granted, bucket in bodies if kind is None]


def test_who_may_wait_for_credit_is_told_when_memory_is_free_again_and_nobody_else(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = filled(network, LAYOUT, 4)
    rich = Caller(network, service, "push", 1)
    monkeypatch.setattr(psserver.partition.ingress.handshake, "MIN_CREDIT_BYTES", 0)
    poor = Caller(network, service, "push")
    assert poor.granted == 2 * len(ONES), "two of the largest gradients"
    for leaf in (0, 2):
        poor.say(push(TRAINED, TreeNode(leaf, 1)), ONES)
    rich.say(push(TRAINED, TreeNode(3, 1), sender=1), ONES)
    assert told_credit(poor) == []
    rich.say(push(TRAINED, TreeNode(1, 1), sender=1), ONES)

    assert told_credit(poor) == [(3 * len(ONES), -1)], "of its node, and which bucket is open now"
    assert told_credit(rich) == [], "it is told with its next answer"
    assert service.clients.of(rich.far).granted_bytes == rich.granted + 2 * len(ONES)  # type: ignore[arg-type]


def test_a_whole_step_by_frames(local: bool, network: Network, service: PartitionService) -> None:
    pusher = Caller(network, service, "push", local=local)
    puller = Caller(network, service, "pull", local=local)
    puller.say(job_header(FrameKind.PULL, generation=1, step=1))
    assert FrameKind.VALUES not in puller.kinds()
    for node in (TreeNode(0, 1), TreeNode(1, 1)):
        pusher.give(push(TRAINED, node), ONES)
        pusher.say(push(AVERAGED, node, flags=UNCHANGED), WEIGHT)
        summary = Summary(loss_sum=1, weight=1, samples=1, touched=b"\1")
        pusher.say(push(SUMMARY, node), summary.pack())
    assert service.version == 0
    pusher.say(push(CARRIED, flags=UNCHANGED), WEIGHT)
    network.settle()

    assert service.version == 1
    values = {bucket: header.step for bucket, (header, _) in puller.values.items()}
    assert values == {TRAINED: 1, AVERAGED: 1, CARRIED: 1}, "the frozen bucket was not asked for"
    assert [len(body) for _, body in puller.values.values()] == ([0, 0, 0] if local else [64, 64, 64])
    hello = [
        Directive.unpack(header, body).action for header, body in puller.received if header.kind is FrameKind.DIRECTIVE
    ]
    assert hello[-1] == "train"


def test_a_summary_of_the_next_step_waits_for_it(local: bool, network: Network, service: PartitionService) -> None:
    caller = Caller(network, service, "push", local=local)
    summary = Summary(loss_sum=1, weight=1, samples=1, touched=b"\1").pack()
    caller.say(push(SUMMARY, step=1), summary)
    assert caller.acks() == []
    for node in (TreeNode(0, 1), TreeNode(1, 1)):
        caller.give(push(TRAINED, node), ONES)
        caller.say(push(AVERAGED, node, flags=UNCHANGED), WEIGHT)
        caller.say(push(SUMMARY, node), summary)
    caller.say(push(CARRIED, flags=UNCHANGED), WEIGHT)
    network.settle()

    assert service.version == 1
    assert service.step is not None
    assert service.step.summary.holds(LEAF)
    assert JOB


def test_a_body_cut_off_gives_its_memory_back(network: Network, service: PartitionService) -> None:
    """The header promised a gradient; the connection broke before the last byte."""
    caller = Caller(network, service, "push")
    assert service.step is not None
    target = service.handler.body_target(caller.far, push(TRAINED, length=64))  # type: ignore[arg-type]
    assert target.nbytes == 64
    assert service.step.pool._free.get(16, []) == []
    caller.far.close()

    assert len(service.step.pool._free[16]) == 1
    assert untouched(service)


def test_a_gradient_that_is_ahead_is_not_taken_for_delivered(
    network: Network, service: PartitionService, local: bool
) -> None:
    """Of a step that the partition before this one had: whose place it took, before it heard the last decision."""
    caller = Caller(network, service, "push", local=local)
    caller.give(push(TRAINED, step=1), ONES)
    assert not caller.near.is_open, "it is sent again over another connection"
    assert caller.acks() == [] and untouched(service) and not network.refused


def test_a_gradient_that_was_ahead_when_it_began_counts_once_it_is_whole(
    network: Network, service: PartitionService
) -> None:
    """The last decision came while its body was on the way."""
    caller = Caller(network, service, "push")
    header = replace(push(TRAINED, step=1), length=len(ONES))
    body = service.handler.body_target(caller.far, header)  # type: ignore[arg-type]
    body[:] = ONES
    service.machine.member = replace(service.member, step=1)
    service.handler.frame(caller.far, header, body)  # type: ignore[arg-type]
    network.settle()
    assert caller.acks() == [AckResult.APPLIED]
