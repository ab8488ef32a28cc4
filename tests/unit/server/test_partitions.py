"""Real partitions of one job on a network that breaks: the same values at the end, whatever was lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.played import Network, PlayedLink, dismiss, fill, played_partition, played_plan, played_spec
from pscluster.job.spec import JobSpec
from pscluster.step.codec import BufferNode
from pscluster.step.layout import BLOCK_WORDS, Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode, touched_bits
from pscluster.v1.plan_pb2 import Plan
from psserver.partition.actions import TryVote
from psserver.partition.process import PartitionService

FINAL_STEP = 3
ROOT = TreeNode(0, 1)
LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(3 * BLOCK_WORDS,), dtype="float32", kind="trained"),
        TensorSpec(names=("b",), shape=(7,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(7,), dtype="float32", kind="averaged"),  # partition 0 updates two buckets
    )
)
TRAINED, AVERAGED = range(2)
NOWHERE = Path("/nonexistent")


class PlayedJob:
    """`count` partitions. Trainers are played: what they would push is offered once they could have computed it."""

    def __init__(self, count: int, transport: str = "tcp") -> None:
        self.network = Network()
        optimizer = {"name": "sgd", "lr": 0.5, "momentum": 0.9}
        train = {"max_steps": FINAL_STEP, "optimizer": optimizer, "clip_norm": 1.0}
        self.spec: JobSpec = played_spec(1, count, train=train, network={"transport": transport})
        self.count = count
        self.generation = 0
        self.restored = 0
        self.partitions = [self.start(index) for index in range(count)]
        self.publish(restore=True)

    def start(self, index: int) -> PartitionService:
        return played_partition(self.network, self.spec, index, NOWHERE)

    def publish(self, *, restore: bool) -> None:
        """A new plan; each partition hears of it when it adopts."""
        self.generation += 1
        self.restored = self.generation if restore else self.restored
        self.plan: Plan = played_plan(
            LAYOUT, {0: [0]}, generation=self.generation, partitions=self.count, restore_generation=self.restored,
            final_step=FINAL_STEP,
        )  # fmt: skip

    def adopt(self, index: int) -> None:
        service = self.partitions[index]
        service.adopt(self.plan)
        if service.state is not None and not service.state.is_filled:
            for values in service.state.values:
                values.fill_(1.0)
            fill(service)

    def crash(self, index: int) -> None:
        """The process is gone, and with it its connections; its replacement has no plan yet."""
        dismiss(self.partitions[index])
        self.partitions[index] = self.start(index)
        self.publish(restore=True)

    def cut(self, choice: int) -> None:
        if self.network.connections:
            self.network.connections[choice % len(self.network.connections)].close(None)

    def push(self, index: int) -> None:
        """Trainers complete a partition's open step, if they have its version from all and the coordinator asks for
        it."""
        service, coordinator = self.partitions[index], self.partitions[0].coordinator
        together = {p.plan.restore_generation if p.plan else 0 for p in self.partitions}
        step = service.member.step
        if coordinator is None or coordinator.activity != "train" or len(together) > 1 or service.step is None:
            return
        if (
            coordinator.version < step
            or any(p.version < step for p in self.partitions)
            or service.step.summary.is_complete
        ):
            return
        span = service.step.state.spans[TRAINED]
        if span.num_words:
            words = torch.linspace(-1, 1 + step, LAYOUT.buckets[TRAINED].num_words)[span.start : span.stop]
            service.step.offer_trained(TRAINED, ROOT, words.clone(), lambda: None)
        if service.step.state.spans[AVERAGED].num_words:
            moved = torch.full((LAYOUT.buckets[AVERAGED].num_words,), 2.0 * (step + 5))
            service.step.offer_buffers(AVERAGED, ROOT, BufferNode(0.0, moved))
        summary = Summary(loss_sum=2.0, weight=2.0, samples=1, touched=touched_bits([0, 1, 2], 3))
        service.step.offer_summary(ROOT, summary)
        service.carry_out([TryVote()])

    def check(self) -> None:
        for restore_generation in {p.plan.restore_generation for p in self.partitions if p.plan}:
            steps = [
                p.member.step for p in self.partitions if p.plan and p.plan.restore_generation == restore_generation
            ]
            assert max(steps) - min(steps) <= 1, f"two steps apart in timeline {restore_generation}: {steps}"

    def run_to_the_end(self) -> list[torch.Tensor]:
        """Without further faults: every plan is adopted, every frame arrives. Returns each partition's values."""
        for _ in range(4 * FINAL_STEP + 8):
            for index in range(self.count):
                self.adopt(index)
                self.push(index)
            self.network.settle()
            self.check()
        versions = [p.version for p in self.partitions]
        assert versions == [FINAL_STEP] * self.count, f"stuck at {versions}: {[p.member for p in self.partitions]}"
        whole = []
        for bucket in LAYOUT.buckets:
            words = torch.zeros(bucket.num_words)
            for partition in self.partitions:
                assert partition.state is not None
                span = partition.state.spans[bucket.index]
                words[span.start : span.stop] = partition.state.values[bucket.index]
            whole.append(words)
        return whole


@pytest.fixture(scope="module")
def undisturbed() -> list[torch.Tensor]:
    values = PlayedJob(1).run_to_the_end()
    assert not torch.equal(values[0], torch.ones_like(values[0]))
    return values


def same(mine: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_any_number_of_partitions_ends_with_the_same_values(
    count: int, transport: str, undisturbed: list[torch.Tensor]
) -> None:
    job = PlayedJob(count, transport)
    assert same(job.run_to_the_end(), undisturbed)
    assert {connection.is_local for connection in job.network.connections} == {transport == "shm"}


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("deliver"), st.integers(0, 30)),
        st.tuples(st.sampled_from(["adopt", "push", "cut", "redial", "crash"]), st.integers(0, 2)),
        st.tuples(st.just("break"), st.integers(0, 79)),
        st.tuples(st.sampled_from(["plan", "everybody adopts", "everybody pushes", "settle"]), st.just(0)),
    ),
    max_size=40,
)


def play(job: PlayedJob, event: str, number: int) -> None:
    index = number % job.count
    if event == "deliver":
        job.network.go_on(number)
    elif event == "crash":
        job.crash(index)
    elif event == "cut":
        job.cut(number)
    elif event == "break":
        job.network.break_soon(number)
    elif event == "redial":
        job.network.fire_timers()
    elif event == "plan":
        job.publish(restore=False)
    elif event == "settle":
        job.network.settle()
    for each in range(job.count) if event.startswith("everybody") else (index,):
        if "adopt" in event:
            job.adopt(each)
        elif "push" in event:
            job.push(each)


@settings(max_examples=250)
@given(count=st.integers(2, 3), transport=st.sampled_from(["tcp", "shm"]), events=EVENTS)
def test_faults_change_nothing_in_the_end(
    count: int, transport: str, events: list[tuple[str, int]], undisturbed: list[torch.Tensor]
) -> None:
    """Connections break, generations change, partitions are lost; plans and frames come when they come."""
    job = PlayedJob(count, transport)
    for event in events:
        play(job, *event)
        job.check()

    assert same(job.run_to_the_end(), undisturbed)
    for partition in job.partitions:
        dismiss(partition)


def begun(count: int = 2) -> PlayedJob:
    """A job whose first step is open everywhere."""
    job = PlayedJob(count)
    for index in range(count):
        job.adopt(index)
    job.network.settle()
    return job


def test_a_vote_that_is_lost_is_said_again(undisturbed: list[torch.Tensor]) -> None:
    job = begun()
    job.push(0)
    job.push(1)
    assert job.partitions[1].member.vote is not None
    job.cut(0)  # the vote was on its way

    assert same(job.run_to_the_end(), undisturbed)


@pytest.mark.parametrize(
    "between", ["nothing", "a plan for all", "a plan for the coordinator", "a plan for the member"]
)
def test_a_decision_that_is_lost_is_said_again(between: str, undisturbed: list[torch.Tensor]) -> None:
    """The coordinator went on; the other partition never heard. A new generation may come in between, to one side
    first."""
    job = begun()
    job.push(0)
    job.push(1)
    while job.partitions[0].member.step == 0:
        job.network.choices()[0]()
    assert job.partitions[1].member.step == 0
    job.cut(0)
    if between != "nothing":
        job.publish(restore=False)
        first = 1 if between == "a plan for the member" else 0
        job.adopt(first)
        job.network.settle()
        if between == "a plan for all":
            job.adopt(1)
            job.network.settle()
    job.network.settle()
    if between in ("nothing", "a plan for all"):
        assert job.partitions[1].version == 1, "it hears of it when it is back, without another plan"

    assert same(job.run_to_the_end(), undisturbed)


@pytest.mark.parametrize("first", [0, 1])
def test_votes_are_cast_again_under_a_new_generation(first: int, undisturbed: list[torch.Tensor]) -> None:
    """Whichever side hears of the plan first, nothing but the plan itself is needed to go on."""
    job = begun()
    job.push(1)
    job.network.settle()
    job.publish(restore=False)
    for index in (first, 1 - first):
        job.adopt(index)
        job.network.settle()
    job.push(0)
    job.network.settle()
    assert [p.version for p in job.partitions] == [1, 1]

    assert same(job.run_to_the_end(), undisturbed)


def test_a_restore_in_the_middle_of_an_update_begins_afresh(undisturbed: list[torch.Tensor]) -> None:
    job = begun()
    job.push(0)
    job.push(1)
    while job.partitions[0].machine.decision is None:
        job.network.choices()[0]()
    assert job.partitions[0].machine.versions == {TRAINED: 1, AVERAGED: 0}
    job.crash(1)
    job.adopt(0)
    assert (job.partitions[0].version, job.partitions[0].member.step) == (0, 0)

    assert same(job.run_to_the_end(), undisturbed)


def test_a_member_of_the_past_is_not_heard(undisturbed: list[torch.Tensor]) -> None:
    """The coordinator has gone back; a partition that has not heard of it keeps knocking, and is sent away."""
    job = begun(3)
    job.crash(2)
    job.adopt(0)
    for _ in range(3):
        job.network.settle()
    coordinator = job.partitions[0].coordinator
    assert coordinator is not None and coordinator.joined == {0}
    assert job.partitions[0].counters.fenced > 0

    assert same(job.run_to_the_end(), undisturbed)


def test_the_coordinator_reports_each_step_once(undisturbed: list[torch.Tensor]) -> None:
    job = PlayedJob(2)
    job.run_to_the_end()
    coordinator = job.partitions[0]
    assert isinstance(coordinator.link, PlayedLink)
    assert coordinator.coordinator is not None
    coordinator.carry_out(coordinator.coordinator.report_progress(1e9, force=True))

    records = [record for progress in coordinator.link.reported("progress") for record in progress.records]

    assert [record.step for record in records] == list(range(1, FINAL_STEP + 1))
    assert {record.loss for record in records} == {1.0}
    assert len(undisturbed) == len(LAYOUT.buckets)
