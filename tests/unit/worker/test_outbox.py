"""What a trainer owes a partition: order, credit, and that the two never wait for each other."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pscluster.layout
import psserver.partition.service
from harness.played import JOB, TOKEN, Network, fill, job_header, played_partition, played_plan, played_spec
from pscluster.layout import Layout, TensorSpec
from pscluster.summary import Summary, touched_bits
from pscluster.tree import Node
from pscluster.wire.frame import SUMMARY, UNCHANGED, Header, Kind
from psserver.partition.service import PartitionService
from psworker.trainer.outbox import Outbox, key_of
from psworker.trainer.peer import Peer

BUCKET_BYTES = 64
NUM_BUCKETS = 5
FIRST = Node(0, 1)
BUFFERS = NUM_BUCKETS  # the bucket of running averages


def push(bucket: int, *, step: int = 0, node: Node = FIRST, flags: int = 0) -> Header:
    return job_header(Kind.PUSH, generation=1, step=step, bucket=bucket, node=node, flags=flags)


def sent(outbox: Outbox) -> list[int]:
    """The buckets of everything that may be sent now, in order."""
    return [owed.header.bucket for owed in iter(outbox.next, None)]


def owing(*buckets: int, granted: int, open_bucket: int) -> Outbox:
    outbox = Outbox()
    outbox.reconnected(granted, open_bucket)
    for bucket in buckets:
        outbox.add(NUM_BUCKETS - bucket, push(bucket), [bytes(BUCKET_BYTES)])
    return outbox


def test_frames_leave_in_the_order_in_which_backward_gives_buckets() -> None:
    outbox = owing(2, 4, 3, granted=1000, open_bucket=4)

    assert sent(outbox) == [4, 3, 2]


def test_credit_admits_what_fits_and_returns_with_grants() -> None:
    outbox = owing(3, 2, 1, granted=2 * BUCKET_BYTES, open_bucket=4)
    assert sent(outbox) == [3, 2]

    outbox.granted_bytes += BUCKET_BYTES - 1
    assert sent(outbox) == []
    outbox.granted_bytes += 1
    assert sent(outbox) == [1]


@pytest.mark.parametrize(
    ("open_bucket", "expected"),
    [(4, []), (3, [3]), (2, [3, 2]), (-1, [3, 2])],
    ids=["not yet", "it", "it and a complete one", "all complete"],
)
def test_without_credit_only_what_takes_no_memory_for_long_is_sent(open_bucket: int, expected: list[int]) -> None:
    assert sent(owing(3, 2, granted=0, open_bucket=open_bucket)) == expected


def test_the_summary_and_statistics_need_no_credit() -> None:
    outbox = owing(granted=0, open_bucket=0)
    outbox.add(9, push(SUMMARY), [bytes(8)])
    outbox.add(9, job_header(Kind.STATISTICS, bucket=SUMMARY), [bytes(8)])

    assert sent(outbox) == [SUMMARY, SUMMARY]


def test_before_the_first_welcome_nothing_is_admitted_by_its_bucket() -> None:
    outbox = Outbox()
    outbox.add(0, push(7), [bytes(4)])

    assert outbox.next() is None


def test_a_new_step_forgets_which_bucket_was_open() -> None:
    outbox = owing(3, granted=0, open_bucket=-1)
    outbox.drop_before(1)
    outbox.add(0, push(3, step=1), [bytes(4)])

    assert len(outbox) == 1
    assert outbox.next() is None


def test_what_is_not_acknowledged_is_sent_again_after_a_reconnect() -> None:
    outbox = owing(3, 2, 1, granted=2 * BUCKET_BYTES, open_bucket=4)
    first, second = outbox.next(), outbox.next()
    assert first is not None and second is not None
    outbox.acknowledged(key_of(first.header))
    outbox.acknowledged(key_of(first.header))

    outbox.reconnected(10 * BUCKET_BYTES, 4)

    assert sent(outbox) == [2, 1]
    assert outbox.sent_bytes == 2 * BUCKET_BYTES


def test_decided_steps_are_forgotten_in_flight_or_not() -> None:
    outbox = owing(3, 2, granted=BUCKET_BYTES, open_bucket=4)
    assert sent(outbox) == [3]
    outbox.add(0, push(3, step=1), [bytes(4)])

    outbox.drop_before(1)
    outbox.reconnected(1000, 4)

    assert [owed.header.step for owed in iter(outbox.next, None)] == [1]
    outbox.clear()
    assert len(outbox) == 0


# ---- trainers and a partition ----


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """Five buckets of 16 words, and one of averaged buffers; a partition grants twice the largest of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pscluster.layout, "BUCKET_WORDS", 16)
        patch.setattr(psserver.partition.service, "MIN_CREDIT_BYTES", 0)
        trained = [
            TensorSpec(names=(f"w{i}",), shape=(16,), dtype="float32", kind="trained") for i in range(NUM_BUCKETS)
        ]
        averaged = TensorSpec(names=("mean",), shape=(16,), dtype="float32", kind="averaged")
        made = Layout((*trained, averaged))
        assert len(made.buckets) == NUM_BUCKETS + 1
        yield made


class PlayedTrainer:
    """A trainer's frames without a model: gradients of ones, each shard pushed as a leaf; a real `Peer` sends."""

    def __init__(self, network: Network, layout: Layout, rank: int) -> None:
        self.rank = rank
        self.layout = layout
        self.step = 0
        self.todo: list[tuple[int, int]] = []  # (shard, bucket) in the order in which backward gives them
        self.peer = Peer(network, self, 0, ["tcp:partition:0"], "tcp")  # type: ignore[arg-type]

    def give(self, shards: list[int]) -> None:
        for shard in shards:
            self.todo += [(shard, bucket) for bucket in reversed(range(NUM_BUCKETS + 2))]

    def compute(self) -> None:
        """Push the next bucket, the buffers, or (as if bucket -1) the summary."""
        shard, place = self.todo.pop(0)
        node, bucket = Node(shard, 1), place - 1
        if bucket < 0:
            summary = Summary(loss_sum=1.0, weight=1.0, samples=1.0, touched=touched_bits(range(6), 6))
            self._owe(push(SUMMARY, step=self.step, node=node), summary.pack(), NUM_BUCKETS + 1)
        elif bucket == BUFFERS and shard % 2:
            body = struct.pack("<d", 1.0)
            self._owe(push(BUFFERS, step=self.step, node=node, flags=UNCHANGED), body, 1)
        else:
            words = struct.pack("<16f", *[float(shard + 1)] * 16)
            self._owe(push(bucket, step=self.step, node=node), words, NUM_BUCKETS + 1 - bucket)

    def _owe(self, header: Header, body: bytes, order: int) -> None:
        self.peer.outbox.add(order, replace(header, sender=self.rank), [body])
        self.peer.push()

    def enter(self, step: int) -> None:
        self.step = step
        self.peer.outbox.drop_before(step)

    def cut(self) -> None:
        """The push connection breaks; the peer dials again."""
        connection = self.peer._connections.get("push")
        if connection is not None:
            connection.close(None)

    def greeting(self, channel: str) -> tuple[Header, bytes]:
        told = {"token": TOKEN.hex(), "role": "trainer", "channel": channel, "restore_generation": 1}
        return job_header(Kind.HELLO, generation=1, sender=self.rank), json.dumps(told).encode()

    def landing(self, index: int, header: Header) -> None: ...

    def landed(self, index: int, header: Header) -> None: ...

    def heard(self, index: int, header: Header, body: memoryview) -> None: ...


class PlayedJob:
    """Trainers with shards dealt round-robin, and one partition with a tiny budget."""

    def __init__(self, layout: Layout, num_shards: int, num_trainers: int) -> None:
        self.network = Network()
        self.num_shards = num_shards
        self.alive = list(range(num_trainers))
        self.partition: PartitionService = played_partition(
            self.network, played_spec(num_shards), 0, Path("/nonexistent")
        )
        self.partition.adopt(played_plan(layout, {rank: [] for rank in self.alive}))
        fill(self.partition)
        self.trainers = [PlayedTrainer(self.network, layout, rank) for rank in self.alive]
        self.network.settle()

    def deal(self) -> None:
        for place, rank in enumerate(self.alive):
            self.trainers[rank].give(list(range(place, self.num_shards, len(self.alive))))

    def lose(self, rank: int) -> None:
        """The trainer dies with what it owes; the others compute everything it had (and more)."""
        self.alive.remove(rank)
        self.trainers[rank].peer.close()
        for survivor in self.alive:
            self.trainers[survivor].give(list(range(self.num_shards)))

    def finish_step(self) -> None:
        """Everybody computes what is left, and every frame arrives: now the step must be done."""
        before = self.partition.version
        for rank in self.alive:
            while self.trainers[rank].todo:
                self.trainers[rank].compute()
        self.network.settle()
        self.network.settle()
        owed = {rank: len(self.trainers[rank].peer.outbox) for rank in self.alive}
        assert self.partition.version == before + 1, f"stuck at {before}: owed {owed}"
        for rank in self.alive:
            self.trainers[rank].enter(before + 1)


@settings(max_examples=60)
@given(data=st.data())
def test_trainers_and_a_partition_with_a_tiny_budget_never_wait_for_each_other(
    layout: Layout, data: st.DataObject
) -> None:
    num_shards = data.draw(st.integers(1, 6), label="shards")
    job = PlayedJob(layout, num_shards, data.draw(st.integers(1, 4), label="trainers"))
    for _ in range(2):
        job.deal()
        for choice in data.draw(st.lists(st.integers(0, 40), max_size=60), label="events"):
            _play(job, choice)
        job.finish_step()
    words = job.partition.step.pool.allocated_bytes if job.partition.step else 0
    live = NUM_BUCKETS * (num_shards + 1) // 2 + len(job.trainers) * 3
    assert words <= BUCKET_BYTES * live
    assert job.partition.counters.invalid == {}


def _play(job: PlayedJob, choice: int) -> None:
    rank = job.alive[choice % len(job.alive)]
    if choice == 40 and len(job.alive) > 1:
        job.lose(rank)
    elif choice in (38, 39):
        job.trainers[rank].cut()
        job.network.fire_timers()
    elif choice < 20 and job.trainers[rank].todo:
        job.trainers[rank].compute()
    elif choices := job.network.choices():
        choices[choice % len(choices)]()


def test_a_trainer_without_credit_hears_that_another_opened_its_bucket(layout: Layout) -> None:
    """One trainer is a whole step ahead of the other: all its credit lies in nodes that wait for theirs."""
    job = PlayedJob(layout, 2, 2)
    job.deal()
    ahead, behind = job.trainers
    while ahead.todo:
        ahead.compute()
    job.network.settle()
    assert len(ahead.peer.outbox) > 0
    while behind.todo:
        behind.compute()

    job.finish_step()


def test_a_recomputed_node_of_a_complete_bucket_holds_nothing_up(layout: Layout) -> None:
    """The other trainer completes a bucket and dies; the survivor, out of credit, sends the same node again."""
    job = PlayedJob(layout, 2, 2)
    job.deal()
    ahead, behind = job.trainers
    while ahead.todo:
        ahead.compute()
    job.network.settle()
    for _ in range(2):  # the buffers and the highest bucket
        behind.compute()
    job.network.settle()

    job.lose(behind.rank)

    job.finish_step()


def test_nothing_is_in_flight_twice(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    job = PlayedJob(layout, 3, 2)
    seen: list[tuple[object, ...]] = []
    take = Outbox.next

    def watched(self: Outbox) -> object:
        in_flight = set(self._in_flight)
        owed = take(self)
        if owed is not None:
            assert key_of(owed.header) not in in_flight
            seen.append(key_of(owed.header))
        return owed

    monkeypatch.setattr(Outbox, "next", watched)
    job.deal()
    for _ in range(4):
        job.trainers[0].compute()
    job.trainers[0].cut()
    job.finish_step()
    assert len(seen) > len(set(seen))  # what was cut off was sent again
    assert JOB
