"""Trainers and a partition with a tiny budget: credit and lanes run out, connections break, nobody waits for ever."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pscluster.step.layout
import psserver.partition.ingress.handshake
from harness.played import JOB, fill, job_header, played_spec
from harness.played_job import PlayedJob
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode, touched_bits
from pscluster.v1.plan_pb2 import PartitionPlacement, ProcessSpec
from pscluster.wire.frame import SUMMARY, UNCHANGED, Buffer, FrameKind, Header
from pscluster.wire.memory import Lanes
from psworker.replica import BucketMemory
from psworker.staging import Staging
from psworker.trainer.gradients.send_queue import Lane, SendQueue, SharedLanes, key_of
from psworker.trainer.peer import Peer
from psworker.trainer.values import Values
from psworker.trainer.work import Agenda

BUCKET_BYTES = 64
NUM_BUCKETS = 5
NUM_LANES = 2
BUFFERS = NUM_BUCKETS  # the bucket of running averages
FIRST = TreeNode(0, 1)
TRANSPORTS = ("tcp", "shm")
WAYS = pytest.mark.parametrize("transport", TRANSPORTS)


def push(bucket: int, *, step: int = 0, node: TreeNode = FIRST, flags: int = 0) -> Header:
    return job_header(FrameKind.PUSH, generation=1, step=step, bucket=bucket, node=node, flags=flags)


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """Five buckets of 16 words, and one of averaged buffers; a partition grants twice the largest of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pscluster.step.layout, "BUCKET_WORDS", 16)
        patch.setattr(psserver.partition.ingress.handshake, "MIN_CREDIT_BYTES", 0)
        trained = [
            TensorSpec(names=(f"w{i}",), shape=(16,), dtype="float32", kind="trained") for i in range(NUM_BUCKETS)
        ]
        averaged = TensorSpec(names=("mean",), shape=(16,), dtype="float32", kind="averaged")
        made = Layout((*trained, averaged))
        assert len(made.buckets) == NUM_BUCKETS + 1
        yield made


class LeafTrainer:
    """A trainer's frames without a model: gradients of ones, each shard pushed as a leaf; a real `Peer` sends."""

    def __init__(self, job: PlayedJob, rank: int, transport: str) -> None:
        self.rank = rank
        self.step = 0
        self.todo: list[tuple[int, int]] = []  # (shard, bucket) in the order in which backward gives them
        layout = job.layout
        agenda = Agenda(ProcessSpec(job_id=JOB, rank=rank))
        agenda.adopt(job.plan)
        self.shared = SharedLanes(job.spec, layout, Staging())
        self.shared.num_lanes = NUM_LANES
        values = Values(job.spec, layout, BucketMemory(layout), agenda.changed)
        addresses = list(job.plan.partitions[0].addresses)
        placement = PartitionPlacement(addresses=addresses)
        self.peer = Peer(job.network, agenda, self.shared, values, lambda *_: None, placement, transport)  # type: ignore[arg-type]

    @property
    def lanes(self) -> Lanes | None:
        return self.shared._lanes.get(0)

    def give(self, shards: list[int]) -> None:
        for shard in shards:
            self.todo += [(shard, bucket) for bucket in reversed(range(NUM_BUCKETS + 2))]

    def compute(self) -> None:
        """Push the next bucket, the buffers, or (as if bucket -1) the summary."""
        shard, place = self.todo.pop(0)
        node, bucket = TreeNode(shard, 1), place - 1
        if bucket < 0:
            summary = Summary(loss_sum=1.0, weight=1.0, samples=1.0, touched=touched_bits(range(6), 6))
            self._send(push(SUMMARY, step=self.step, node=node), summary.pack(), NUM_BUCKETS + 1)
        elif bucket == BUFFERS and shard % 2:
            body = struct.pack("<d", 1.0)
            self._send(push(BUFFERS, step=self.step, node=node, flags=UNCHANGED), body, 1)
        else:
            words: Buffer = struct.pack("<16f", *[float(shard + 1)] * 16)
            lane = self.shared.take(0, bucket) if bucket < BUFFERS else None
            if lane is not None:
                lane.lanes.place(bucket, lane.number)[:] = words
                words = lane.lanes.place(bucket, lane.number)
            self._send(push(bucket, step=self.step, node=node), words, NUM_BUCKETS + 1 - bucket, lane)

    def _send(self, header: Header, body: Buffer, order: int, lane: Lane | None = None) -> None:
        self.peer.pushes.enqueue(order, replace(header, sender=self.rank), [body], lane)

    def enter(self, step: int) -> None:
        self.step = step
        self.peer.pushes.queue.drop_before(step)

    def cut(self) -> None:
        """The push connection breaks; the peer dials again."""
        connection = self.peer.pushes.line.connection
        if connection is not None:
            connection.close(None)


class TightJob(PlayedJob):
    """Trainers with shards dealt round-robin, and one partition with a tiny budget."""

    def __init__(self, layout: Layout, num_shards: int, transports: list[str]) -> None:
        self.alive = list(range(len(transports)))
        super().__init__(played_spec(num_shards), layout, {rank: [] for rank in self.alive})
        self.num_shards = num_shards
        self.publish(restore=True)
        self.everybody_adopts()
        fill(self.partition(0))
        self.trainers = [LeafTrainer(self, rank, way) for rank, way in enumerate(transports)]
        self.network.settle()

    def deal(self) -> None:
        for place, rank in enumerate(self.alive):
            self.trainers[rank].give(list(range(place, self.num_shards, len(self.alive))))

    def lose_trainer(self, rank: int) -> None:
        """The trainer dies with what it owes; the others compute everything it had (and more)."""
        self.alive.remove(rank)
        self.trainers[rank].peer.close()
        for survivor in self.alive:
            self.trainers[survivor].give(list(range(self.num_shards)))

    def finish_step(self) -> None:
        """Everybody computes what is left, and every frame arrives: now the step must be done."""
        before = self.partition(0).version
        for rank in self.alive:
            while self.trainers[rank].todo:
                self.trainers[rank].compute()
        self.network.settle()
        self.network.settle()
        pending = {rank: len(self.trainers[rank].peer.pushes.queue) for rank in self.alive}
        assert self.partition(0).version == before + 1, f"stuck at {before}: owed {pending}"
        self.check()
        assert self.network.refused == []
        for rank in self.alive:
            self.trainers[rank].enter(before + 1)
            lanes = self.trainers[rank].lanes
            assert lanes is None or not any(lanes._taken), "every lane was given back"

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.peer.close()
        super().close()


@settings(max_examples=60)
@given(data=st.data())
def test_trainers_and_a_partition_with_a_tiny_budget_never_deadlock(layout: Layout, data: st.DataObject) -> None:
    num_shards = data.draw(st.integers(1, 6), label="shards")
    transports = data.draw(st.lists(st.sampled_from(TRANSPORTS), min_size=1, max_size=4), label="trainers")
    job = TightJob(layout, num_shards, transports)
    for _ in range(2):
        job.deal()
        for choice in data.draw(st.lists(st.integers(0, 40), max_size=60), label="events"):
            _play(job, choice)
        job.finish_step()
    step = job.partition(0).step
    words = step.pool.allocated_bytes if step else 0
    live = NUM_BUCKETS * (num_shards + 1) // 2 + len(job.trainers) * 3
    assert words <= BUCKET_BYTES * live
    job.close()


def _play(job: TightJob, choice: int) -> None:
    rank = job.alive[choice % len(job.alive)]
    if choice == 40 and len(job.alive) > 1:
        job.lose_trainer(rank)
    elif choice in (38, 39):
        job.trainers[rank].cut()
        job.network.fire_timers()
    elif choice < 20 and job.trainers[rank].todo:
        job.trainers[rank].compute()
    elif choices := job.network.choices():
        choices[choice % len(choices)]()


@WAYS
def test_a_trainer_without_credit_learns_that_another_opened_its_bucket(transport: str, layout: Layout) -> None:
    """One trainer is a whole step ahead of the other: all its credit lies in nodes that wait for theirs."""
    job = TightJob(layout, 2, [transport] * 2)
    job.deal()
    ahead, behind = job.trainers
    while ahead.todo:
        ahead.compute()
    job.network.settle()
    assert len(ahead.peer.pushes.queue) > 0
    while behind.todo:
        behind.compute()

    job.finish_step()


@WAYS
def test_a_recomputed_node_of_a_complete_bucket_holds_nothing_up(transport: str, layout: Layout) -> None:
    """The other trainer completes a bucket and dies; the survivor, out of credit, sends the same node again."""
    job = TightJob(layout, 2, [transport] * 2)
    job.deal()
    ahead, behind = job.trainers
    while ahead.todo:
        ahead.compute()
    job.network.settle()
    for _ in range(2):  # the buffers and the highest bucket
        behind.compute()
    job.network.settle()

    job.lose_trainer(behind.rank)

    job.finish_step()


@WAYS
def test_nothing_is_in_flight_twice(transport: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    job = TightJob(layout, 3, [transport] * 2)
    seen: list[tuple[object, ...]] = []
    take = SendQueue.next

    def watched(self: SendQueue) -> object:
        in_flight = set(self._in_flight)
        pending = take(self)
        if pending is not None:
            assert key_of(pending.header) not in in_flight
            seen.append(key_of(pending.header))
        return pending

    monkeypatch.setattr(SendQueue, "next", watched)
    job.deal()
    for _ in range(4):
        job.trainers[0].compute()
    job.trainers[0].cut()
    job.finish_step()
    assert len(seen) > len(set(seen))  # what was cut off was sent again
