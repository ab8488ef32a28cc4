"""A job of real partitions without trainers, and what may befall it in any order: events by name, storms by seed."""

from __future__ import annotations

import random

import torch
from hypothesis import strategies as st

from harness.played import fill, played_spec
from harness.played_job import AVERAGED, CARRIED, FROZEN, LAYOUT, MEAN, TRAINED, B, PlayedJob, W
from pscluster.step.codec import DTYPES, BufferNode
from pscluster.step.tree import Summary, TreeNode, touched_bits
from pscluster.wire.partition_protocol import Evaluation
from psserver.partition.actions import ReplicateEvaluation, TryVote
from psserver.partition.process import PartitionService

FINAL_STEP = 4
ROOT = TreeNode(0, 1)


class OfferedJob(PlayedJob):
    """Without trainers: what they would push is offered to the open steps once they could have computed it."""

    def __init__(self, count: int, codec: str = "fp32", *, standbys: bool = True, transport: str = "tcp") -> None:
        optimizer = {"name": "adamw", "lr": 0.5, "weight_decay": 0.1}
        spec = played_spec(
            1, count, train={"max_steps": FINAL_STEP, "optimizer": optimizer, "clip_norm": 1.0},
            network={"transport": transport, "push_codec": codec}, durability={"tier": "replica", "every_steps": 2},
        )  # fmt: skip
        super().__init__(spec, LAYOUT, {0: [0]}, standbys=standbys)
        self.evaluated: set[int] = set()  # versions since the restore of which an evaluation was finalised
        self.values_at_the_end: list[torch.Tensor] = []
        self.publish(restore=True)

    def publish(self, *, restore: bool = False) -> None:
        super().publish(restore=restore)
        if restore:
            self.evaluated.clear()

    def lose_partition(self, index: int, *, lives_on: bool = False) -> None:
        if index == 0:  # the others come again
            self.evaluated = {version for version in self.evaluated if version in self.committed}
        super().lose_partition(index, lives_on=lives_on)

    def adopt(self, number: int) -> None:
        super().adopt(number)
        service = self.members()[number % len(self.processes)]
        state = service.state
        if service.standby is None and state is not None and not state.is_filled:
            for values in state.values:
                values.fill_(1.0)
            state.values[FROZEN].fill_(3.0)
            fill(service)

    def push(self, index: int) -> None:
        """Trainers complete a partition's open step, if they have its version from all and the coordinator asks for
        it."""
        service, coordinator, everyone = self.partition(index), self.partition(0).coordinator, self.partitions
        step = service.member.step
        restores = {p.plan.restore_generation if p.plan else 0 for p in everyone}
        if coordinator is None or coordinator.activity != "train" or len(restores) > 1 or service.step is None:
            return
        if service.standby is not None or coordinator.version < step or any(p.version < step for p in everyone):
            return
        if not service.step.summary.is_complete and step < FINAL_STEP:
            self._complete(service, step)

    def evaluate(self) -> None:
        """The coordinator's evaluation of its version is finalised: trainers have not begun the step that it is
        before."""
        service = self.partition(0)
        coordinator, step, plan = service.coordinator, service.step, service.plan
        if coordinator is None or not coordinator.is_open or step is None or plan is None:
            return
        begun = step.complete_buckets() or service.version != coordinator.version
        is_open = not begun and not service.machine.is_updating
        if is_open and plan.restore_generation == self.master.restored and service.version not in self.evaluated:
            self.evaluated.add(service.version)
            service.carry_out([ReplicateEvaluation(Evaluation(service.version, {"loss": float(service.version)}))])

    def _complete(self, service: PartitionService, step: int) -> None:
        opened = service.step
        assert opened is not None
        odd = step % 2
        span = opened.state.spans[TRAINED]
        if span.num_words:
            words = torch.linspace(-1, 1 + step, LAYOUT.buckets[TRAINED].num_words)[span.start : span.stop]
            dtype = DTYPES[self.spec.network.push_codec]
            opened.offer_trained(TRAINED, ROOT, words.to(dtype).clone(), lambda: None)
        if opened.state.spans[AVERAGED].num_words:
            moved = torch.full((LAYOUT.buckets[AVERAGED].num_words,), 2.0 * (step + 5))
            opened.offer_buffers(AVERAGED, ROOT, BufferNode(2.0, None if odd else moved))
        if opened.state.spans[CARRIED].num_words:
            counted = torch.full((LAYOUT.buckets[CARRIED].num_words,), step, dtype=torch.int32)
            opened.offer_buffers(CARRIED, ROOT, BufferNode(0.0, counted.view(opened.state.values[CARRIED].dtype)))
        touched = touched_bits([W] if odd else [W, B, MEAN], len(LAYOUT.tensors))
        opened.offer_summary(ROOT, Summary(loss_sum=2.0 + step, weight=2.0, samples=1, touched=touched))
        service.carry_out([TryVote()])

    def check(self) -> None:
        """No evaluation is lost either."""
        super().check()
        for p in self.current():
            if p.index == 0 and (p.standby is None or (self.master.synced[0] and p.standby.is_synced)):
                noted = {evaluation.step for evaluation in p.metadata.evaluations}
                assert noted >= self.evaluated & self.committed.keys(), f"evaluations are lost: {noted}"

    def settle(self) -> None:
        self.network.settle()
        self.hear_reports()
        self.check()

    def make_steps(self, count: int) -> None:
        """So many steps in which nothing goes wrong, the standbys' acknowledgements included."""
        for _ in range(count):
            self.everybody_adopts()
            self.settle()
            for index in range(self.count):
                self.push(index)
            self.settle()

    def run_to_the_end(self) -> list[torch.Tensor]:
        """Without further faults: every plan is adopted, every frame arrives. Returns the model's values."""
        for _ in range(4 * FINAL_STEP + 12):
            self.everybody_adopts()
            for index in range(self.count):
                self.push(index)
            self.settle()
        versions = [p.version for p in self.partitions]
        assert versions == [FINAL_STEP] * self.count, f"stuck at {versions}: {[p.member for p in self.partitions]}"
        return self.values(self.partitions)

    def values(self, everyone: list[PartitionService]) -> list[torch.Tensor]:
        """What these partitions hold, as bits."""
        whole = []
        for bucket in LAYOUT.buckets:
            words = torch.zeros(bucket.num_words, dtype=torch.int32)
            for service in everyone:
                assert service.state is not None
                span = service.state.spans[bucket.index]
                words[span.start : span.stop] = service.state.values[bucket.index].view(torch.int32)
            whole.append(words)
        return whole


def same(mine: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two jobs came to the same bits."""
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


Events = list[tuple[str, int]]


def events_of(*kinds: str, max_size: int) -> st.SearchStrategy[Events]:
    """Lists of events: what any job may meet, and the kinds named."""
    return st.lists(
        st.one_of(
            st.tuples(st.just("deliver"), st.integers(0, 30)),
            st.tuples(st.sampled_from(["adopt", "push", "cut", "redial", *kinds]), st.integers(0, 5)),
            st.tuples(st.just("break"), st.integers(0, 79)),
            st.tuples(st.sampled_from(["plan", "everybody adopts", "everybody pushes", "settle"]), st.just(0)),
        ),
        max_size=max_size,
    )


def play(job: OfferedJob, event: str, number: int) -> None:
    index = number % job.count
    if event == "deliver":
        job.network.go_on(number)
    elif event == "adopt":
        job.adopt(number)
    elif event == "push":
        job.push(index)
    elif event == "cut":
        job.cut(number)
    elif event == "break":
        job.network.break_soon(number)
    elif event == "redial":
        job.network.fire_timers()
    elif event == "partition lost":
        job.lose_partition(index)
    elif event == "taken for lost":
        job.lose_partition(index, lives_on=True)
    elif event == "standby lost":
        job.lose_standby(index)
    elif event == "standby comes":
        job.place_standby(index)
        job.publish()
    elif event == "plan":
        job.publish()
    elif event == "everybody adopts":
        job.everybody_adopts()
    elif event == "evaluate":
        job.evaluate()
    elif event == "everybody pushes":
        for each in range(job.count):
            job.push(each)
    elif event == "settle":
        job.settle()


KINDS = {
    "deliver": 8, "everybody adopts": 6, "everybody pushes": 6, "push": 4, "evaluate": 4, "settle": 4, "adopt": 3,
    "cut": 2, "break": 4, "redial": 2, "standby comes": 2, "plan": 1, "partition lost": 1, "taken for lost": 1,
    "standby lost": 1,
}  # fmt: skip


def seeded(seed: int) -> OfferedJob:
    """A storm that begins mostly with what a healthy job does; the job it was, before its end."""
    chance = random.Random(seed)
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=chance.randrange(10, 80))
    job = OfferedJob(chance.randint(1, 3), chance.choice(["fp32", "bf16"]))
    try:
        for kind in kinds:
            play(job, kind, chance.randrange({"deliver": 31, "break": 80}.get(kind, 6)))
            job.hear_reports()
            job.check()
        job.values_at_the_end = job.run_to_the_end()
    finally:
        job.close()
    return job
