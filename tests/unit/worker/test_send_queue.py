"""What a trainer owes a partition: order, credit, lanes; what is sent again, and what is forgotten."""

from __future__ import annotations

import pytest

from harness.played import job_header
from pscluster.step.tree import TreeNode
from pscluster.wire.frame import SUMMARY, FrameKind, Header
from pscluster.wire.memory import Lanes
from psworker.trainer.gradients.lanes import Lane
from psworker.trainer.gradients.send_queue import PendingFrame, SendQueue, key_of

BUCKET_BYTES = 64
NUM_BUCKETS = 5
FIRST = TreeNode(0, 1)


def push(bucket: int, *, step: int = 0, node: TreeNode = FIRST) -> Header:
    return job_header(FrameKind.PUSH, generation=1, step=step, bucket=bucket, node=node)


def sent(queue: SendQueue) -> list[int]:
    """The buckets of everything that may be sent now, in order."""
    return [pending.header.bucket for pending in iter(queue.next, None)]


def owing(*buckets: int, granted: int, open_bucket: int) -> SendQueue:
    queue = SendQueue()
    queue.reconnected(granted, open_bucket)
    for bucket in buckets:
        queue.add(NUM_BUCKETS - bucket, push(bucket), [bytes(BUCKET_BYTES)])
    return queue


def test_frames_leave_in_the_order_in_which_backward_gives_buckets() -> None:
    queue = owing(2, 4, 3, granted=1000, open_bucket=4)

    assert sent(queue) == [4, 3, 2]


def test_credit_admits_what_fits_and_returns_with_grants() -> None:
    queue = owing(3, 2, 1, granted=2 * BUCKET_BYTES, open_bucket=4)
    assert sent(queue) == [3, 2]

    queue.granted_bytes += BUCKET_BYTES - 1
    assert sent(queue) == []
    queue.granted_bytes += 1
    assert sent(queue) == [1]


@pytest.mark.parametrize(
    ("open_bucket", "expected"),
    [(4, []), (3, [3]), (2, [3, 2]), (-1, [3, 2])],
    ids=["not yet", "it", "it and a complete one", "all complete"],
)
def test_without_credit_only_what_takes_no_memory_for_long_is_sent(open_bucket: int, expected: list[int]) -> None:
    assert sent(owing(3, 2, granted=0, open_bucket=open_bucket)) == expected


def test_the_summary_and_statistics_need_no_credit() -> None:
    queue = owing(granted=0, open_bucket=0)
    queue.add(9, push(SUMMARY), [bytes(8)])
    queue.add(9, job_header(FrameKind.STATISTICS, bucket=SUMMARY), [bytes(8)])

    assert sent(queue) == [SUMMARY, SUMMARY]


def test_before_the_first_welcome_nothing_is_admitted_by_its_bucket() -> None:
    queue = SendQueue()
    queue.add(0, push(7), [bytes(4)])

    assert queue.next() is None


def test_a_new_step_forgets_which_bucket_was_open() -> None:
    queue = owing(3, granted=0, open_bucket=-1)
    queue.drop_before(1)
    queue.add(0, push(3, step=1), [bytes(4)])

    assert len(queue) == 1
    assert queue.next() is None


def test_what_is_not_acknowledged_is_sent_again_after_a_reconnect() -> None:
    queue = owing(3, 2, 1, granted=2 * BUCKET_BYTES, open_bucket=4)
    first, second = queue.next(), queue.next()
    assert first is not None and second is not None
    queue.acknowledged(key_of(first.header))
    queue.acknowledged(key_of(first.header))

    queue.reconnected(10 * BUCKET_BYTES, 4)

    assert sent(queue) == [2, 1]
    assert queue.sent_bytes == 2 * BUCKET_BYTES


def test_decided_steps_are_forgotten_in_flight_or_not() -> None:
    queue = owing(3, 2, granted=BUCKET_BYTES, open_bucket=4)
    assert sent(queue) == [3]
    queue.add(0, push(3, step=1), [bytes(4)])

    queue.drop_before(1)
    queue.reconnected(1000, 4)

    assert [pending.header.step for pending in iter(queue.next, None)] == [1]


# ---- lanes ----


def some_lanes() -> Lanes:
    """Two places for each bucket."""
    return Lanes.create([BUCKET_BYTES] * NUM_BUCKETS, 2)


def enqueue(queue: SendQueue, lanes: Lanes, bucket: int, *, step: int = 0) -> Lane:
    """Owe a frame that lies in a free lane."""
    number = lanes.take(bucket)
    assert number is not None
    lane = Lane(lanes, bucket, number)
    queue.add(NUM_BUCKETS - bucket, push(bucket, step=step), [lanes.place(bucket, number)], lane)
    return lane


def is_taken(lane: Lane) -> bool:
    return bool(lane.lanes._taken[lane.bucket * lane.lanes.num_lanes + lane.number])


def next_of(queue: SendQueue) -> PendingFrame:
    pending = queue.next()
    assert pending is not None
    return pending


def test_what_lies_in_shared_memory_needs_no_credit() -> None:
    queue, lanes = SendQueue(), some_lanes()
    queue.reconnected(0, NUM_BUCKETS, lanes)
    for bucket in (3, 2):
        enqueue(queue, lanes, bucket)
    queue.add(NUM_BUCKETS - 1, push(1), [bytes(BUCKET_BYTES)])

    found = [next_of(queue), next_of(queue)]
    assert [pending.header.bucket for pending in found] == [3, 2]
    assert all(queue.is_shared(pending) for pending in found)
    assert queue.sent_bytes == 0
    assert queue.next() is None, "what goes over the socket does"


@pytest.mark.parametrize("again", [True, False], ids=["new lanes", "no lanes"])
def test_lanes_of_the_old_connection_do_not_count_over_a_new_one(again: bool) -> None:
    """The frame is sent whole, from where it lies, for credit; the new connection's lanes are for new frames."""
    queue, lanes = SendQueue(), some_lanes()
    queue.reconnected(0, NUM_BUCKETS, lanes)
    old = enqueue(queue, lanes, 3)
    lanes.place(3, old.number)[:] = b"x" * BUCKET_BYTES
    assert queue.is_shared(next_of(queue))
    waiting = enqueue(queue, lanes, 2)

    fresh = some_lanes() if again else None
    queue.reconnected(2 * BUCKET_BYTES, NUM_BUCKETS, fresh)

    found = [next_of(queue), next_of(queue)]
    assert [pending.header.bucket for pending in found] == [3, 2]
    assert not any(queue.is_shared(pending) for pending in found)
    assert bytes(memoryview(found[0].parts[0])) == b"x" * BUCKET_BYTES
    assert queue.sent_bytes == 2 * BUCKET_BYTES
    assert is_taken(old) and is_taken(waiting), "nobody writes there"
    if fresh is not None:
        enqueue(queue, fresh, 1)
        assert queue.is_shared(next_of(queue))


def test_a_lane_of_an_old_connection_waits_for_credit_like_any_other_frame() -> None:
    queue, lanes = SendQueue(), some_lanes()
    queue.reconnected(0, NUM_BUCKETS, lanes)
    enqueue(queue, lanes, 3)
    next_of(queue)
    queue.reconnected(BUCKET_BYTES - 1, NUM_BUCKETS, some_lanes())
    assert queue.next() is None

    queue.granted_bytes = BUCKET_BYTES
    assert next_of(queue).header.bucket == 3


def test_of_a_decided_step_what_was_not_sent_gives_its_lane_back() -> None:
    """What was sent is the partition's, which gives it back itself."""
    queue, lanes = SendQueue(), some_lanes()
    queue.reconnected(0, NUM_BUCKETS, lanes)
    sent_lane, unsent, later = enqueue(queue, lanes, 3), enqueue(queue, lanes, 2), enqueue(queue, lanes, 2, step=1)
    assert next_of(queue).header.bucket == 3

    queue.drop_before(1)

    assert is_taken(sent_lane) and not is_taken(unsent) and is_taken(later)
    assert [pending.header.step for pending in iter(queue.next, None)] == [1]
    assert is_taken(later)


def test_what_waits_to_be_sent_again_gives_the_old_lane_back() -> None:
    """To the lanes of the connection that broke: the place of the same number in the new ones is not touched."""
    queue, lanes, fresh = SendQueue(), some_lanes(), some_lanes()
    queue.reconnected(0, NUM_BUCKETS, lanes)
    old = enqueue(queue, lanes, 3)
    next_of(queue)
    queue.reconnected(0, NUM_BUCKETS, fresh)
    new = enqueue(queue, fresh, 3, step=1)
    assert new.number == old.number

    queue.drop_before(1)

    assert not is_taken(old) and is_taken(new)


def test_an_acknowledgement_does_not_give_a_lane_back() -> None:
    """The partition may still sum there; it says itself when the place is free."""
    queue, lanes = SendQueue(), some_lanes()
    queue.reconnected(0, NUM_BUCKETS, lanes)
    lane = enqueue(queue, lanes, 3)
    queue.acknowledged(key_of(next_of(queue).header))

    assert is_taken(lane) and len(queue) == 0
