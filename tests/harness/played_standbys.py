"""A job of real partitions with real standbys on a played network, under a played master.

Trainers are played, too: what they would push is offered once they could have computed it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from harness.played import Network, dismiss, fill, played_partition, played_plan, played_spec
from pscluster.job.spec import JobSpec
from pscluster.step.codec import DTYPES, BufferNode
from pscluster.step.layout import BLOCK_WORDS, Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode, touched_bits
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.partition_protocol import Evaluation
from psserver.partition.actions import ReplicateEvaluation, TryVote
from psserver.partition.process import PartitionService

FINAL_STEP = 4
ROOT = TreeNode(0, 1)
LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(3 * BLOCK_WORDS,), dtype="float32", kind="trained", decay=True),
        TensorSpec(names=("b",), shape=(7,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(7,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
        TensorSpec(names=("fixed",), shape=(3,), dtype="float32", kind="frozen"),
    )
)
TRAINED, AVERAGED, CARRIED, FROZEN = range(4)
NOWHERE = Path("/nonexistent")


class Master:
    """What the master knows and plans: attempts, and who was reported in sync."""

    def __init__(self, count: int) -> None:
        self.generation = self.restored = self.moved = self.led = 0
        self.partitions = [1] * count
        self.standbys: list[int] = [0] * count
        self.synced = [False] * count
        self.attempts = [1] * count
        self.restores = self.takeovers = 0


class PlayedJob:
    """`count` partitions, each with a standby from the first plan on unless `standbys` is False."""

    def __init__(self, count: int, codec: str = "fp32", *, standbys: bool = True) -> None:
        self.network = Network()
        optimizer = {"name": "adamw", "lr": 0.5, "weight_decay": 0.1}
        self.spec: JobSpec = played_spec(
            1, count, train={"max_steps": FINAL_STEP, "optimizer": optimizer, "clip_norm": 1.0},
            network={"transport": "tcp", "push_codec": codec}, durability={"tier": "replica", "every_steps": 2},
        )  # fmt: skip
        self.count = count
        self.master = Master(count)
        self.processes: dict[tuple[int, int], PartitionService] = {}
        self.zombies: list[PartitionService] = []
        self.committed: dict[int, float] = {}  # step -> norm, as anybody carried it out
        self.evaluated: set[int] = set()  # versions of this timeline of which an evaluation was finalised
        self.values_at_the_end: list[torch.Tensor] = []
        for index in range(count):
            self._start(index, 1)
        if standbys:
            for index in range(count):
                self.placement_standby(index)
        self.publish(restore=True)

    def _start(self, index: int, attempt: int) -> None:
        self.processes[index, attempt] = played_partition(self.network, self.spec, index, NOWHERE, attempt=attempt)

    def partition(self, index: int) -> PartitionService:
        """Who holds the partition by the newest plan."""
        return self.processes[index, self.master.partitions[index]]

    def standby(self, index: int) -> PartitionService | None:
        return self.processes.get((index, self.master.standbys[index]))

    # ---- the master ----

    def placement_standby(self, index: int) -> None:
        """A new standby process; the next plan names it."""
        m = self.master
        if not m.standbys[index]:
            m.attempts[index] += 1
            m.standbys[index] = m.attempts[index]
            self._start(index, m.attempts[index])

    def publish(self, *, restore: bool) -> None:
        m = self.master
        m.generation += 1
        if restore:
            m.restored = m.generation
            m.restores += 1
            m.synced = [False] * self.count
            self.committed.clear()
            self.evaluated.clear()
        plan = played_plan(
            LAYOUT, {0: [0]}, generation=m.generation, partitions=self.count, restore_generation=m.restored,
            final_step=FINAL_STEP, moved_generation=m.moved, coordinator_generation=m.led,
        )  # fmt: skip
        for index, placement in enumerate(plan.partitions):
            placement.attempt = m.partitions[index]
            del placement.addresses[:]
            placement.addresses.append(f"tcp:partition:{index}:{placement.attempt}")
            if m.standbys[index]:
                placement.standby.attempt = m.standbys[index]
                placement.standby.addresses.append(f"tcp:partition:{index}:{m.standbys[index]}")
        self.plan: Plan = plan

    def hear_reports(self) -> None:
        """What partitions said of their standbys, as the master counts it."""
        m = self.master
        for (index, attempt), service in list(self.processes.items()):
            link: Any = service.link
            said = [r.standby_state for r in link.reports if r.WhichOneof("body") == "standby_state"]
            link.reports = [r for r in link.reports if r.WhichOneof("body") != "standby_state"]
            assert not link.reported("failure"), link.reported("failure")
            for state in said:
                if attempt != m.partitions[index] or state.attempt != m.standbys[index]:
                    continue
                if state.generation >= m.restored and state.in_sync:
                    m.synced[index] = True
                elif not state.in_sync:
                    self.lose_standby(index)

    def lose_standby(self, index: int) -> None:
        """The standby is gone: the plan goes on without it."""
        m = self.master
        if m.standbys[index]:
            dismiss(self.processes.pop((index, m.standbys[index])))
            self._unlisten(index, m.standbys[index])
            m.standbys[index], m.synced[index] = 0, False
            self.publish(restore=False)

    def lose_partition(self, index: int, *, lives_on: bool = False) -> None:
        """The partition is gone, or the master believes so: its standby takes over, or all go back."""
        m = self.master
        self.hear_reports()
        gone = self.processes.pop((index, m.partitions[index]))
        self._unlisten(index, m.partitions[index])
        if lives_on:
            self.zombies.append(gone)
        else:
            dismiss(gone)
        synced = m.synced[index]
        m.synced[index] = False
        if index == 0:
            self.evaluated = {version for version in self.evaluated if version in self.committed}  # others come again
        if m.standbys[index]:
            m.partitions[index], m.standbys[index] = m.standbys[index], 0
        else:
            m.attempts[index] += 1
            m.partitions[index] = m.attempts[index]
            self._start(index, m.partitions[index])
        self.publish_takeover(index, restore=not synced)

    def publish_takeover(self, index: int, *, restore: bool) -> None:
        m = self.master
        if not restore:
            m.takeovers += 1
            m.moved = m.generation + 1
            m.led = m.generation + 1 if index == 0 else m.led
        self.publish(restore=restore)

    def _unlisten(self, index: int, attempt: int) -> None:
        del self.network.listeners[f"partition:{index}:{attempt}"]

    # ---- processes ----

    def adopt(self, number: int) -> None:
        keys = sorted(self.processes)
        index, attempt = keys[number % len(keys)]
        service = self.processes[index, attempt]
        if attempt not in (self.master.partitions[index], self.master.standbys[index]):
            return
        service.adopt(self.plan)
        state = service.state
        if service.standby is None and state is not None and not state.is_filled:
            for values in state.values:
                values.fill_(1.0)
            state.values[FROZEN].fill_(3.0)
            fill(service)

    def everybody_adopts(self) -> None:
        for number in range(len(self.processes)):
            self.adopt(number)

    def cut(self, choice: int) -> None:
        if self.network.connections:
            self.network.connections[choice % len(self.network.connections)].close(None)

    def push(self, index: int) -> None:
        """Trainers complete a partition's open step, if they have its version from all and the coordinator asks for
        it."""
        service, coordinator = self.partition(index), self.partition(0).coordinator
        everyone = [self.partition(i) for i in range(self.count)]
        step = service.member.step
        timelines = {p.plan.restore_generation if p.plan else 0 for p in everyone}
        if coordinator is None or coordinator.activity != "train" or len(timelines) > 1 or service.step is None:
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
        if (
            coordinator is None
            or not coordinator.is_open
            or step is None
            or plan is None
            or service.machine.is_updating
        ):
            return
        begun = step.complete_buckets() or service.version != coordinator.version
        if not begun and plan.restore_generation == self.master.restored and service.version not in self.evaluated:
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
        touched = touched_bits([0] if odd else [0, 1, 2], len(LAYOUT.tensors))
        opened.offer_summary(ROOT, Summary(loss_sum=2.0 + step, weight=2.0, samples=1, touched=touched))
        service.carry_out([TryVote()])

    def check(self) -> None:
        """Nobody is two steps ahead, and each step has one decision, which is never taken back within a timeline."""
        current = [p for p in self.processes.values() if p.plan and p.plan.restore_generation == self.master.restored]
        partitions = [p for p in current if p.standby is None]
        steps = [p.member.step for p in partitions]
        assert not steps or max(steps) - min(steps) <= 1, f"two steps apart: {steps}"
        for p in current:
            last = p.member.last_decision
            if last is not None:
                known = self.committed.setdefault(last.step, last.norm)
                assert known == last.norm, f"two decisions on step {last.step}: {known} and {last.norm}"
        newest = max(self.committed, default=-1)
        for index, synced in enumerate(self.master.synced):
            standby = self.standby(index)
            if synced and standby is not None and standby.standby is not None:
                acked_version = standby.member.step + (standby.member.vote is not None)
                assert acked_version > newest, f"the standby of {index} could not make the committed step {newest}"
        for p in current:
            if p.index == 0 and (p.standby is None or (self.master.synced[0] and p.standby.is_synced)):
                noted = {evaluation.step for evaluation in p.metadata.evaluations}
                assert noted >= self.evaluated & self.committed.keys(), f"evaluations are lost: {noted}"
        serious = [error for error in self.network.refused if error.code != "PS-3002"]
        assert serious == []

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
        everyone = [self.partition(i) for i in range(self.count)]
        versions = [p.version for p in everyone]
        assert versions == [FINAL_STEP] * self.count, f"stuck at {versions}: {[p.member for p in everyone]}"
        return self.values(everyone)

    def values(self, everyone: list[PartitionService]) -> list[torch.Tensor]:
        whole = []
        for bucket in LAYOUT.buckets:
            words = torch.zeros(bucket.num_words, dtype=torch.int32)
            for service in everyone:
                assert service.state is not None
                span = service.state.spans[bucket.index]
                words[span.start : span.stop] = service.state.values[bucket.index].view(torch.int32)
            whole.append(words)
        return whole

    def close(self) -> None:
        for service in (*self.processes.values(), *self.zombies):
            dismiss(service)
