"""A job of real partitions, with real standbys if it has any, on a played network, under a played master."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.played import Network, dismiss, played_partition, played_plan
from pscluster.job.spec import JobSpec
from pscluster.step.layout import BLOCK_WORDS, Layout, TensorSpec
from pscluster.v1.plan_pb2 import Plan
from psserver.partition.process import PartitionService

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(3 * BLOCK_WORDS + 5,), dtype="float32", kind="trained", decay=True),
        TensorSpec(names=("b",), shape=(7,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(7,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
        TensorSpec(names=("fixed",), shape=(3,), dtype="float32", kind="frozen"),
    )
)
W, B, MEAN, COUNT, FIXED = range(5)
TRAINED, AVERAGED, CARRIED, FROZEN = range(4)  # buckets


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
    """The partitions of `spec`, each with a standby from the first plan on if `standbys`. No plan is published yet.

    `shards`: what the next plan assigns, by trainer."""

    def __init__(
        self, spec: JobSpec, layout: Layout, shards: Mapping[int, Sequence[int]], *, standbys: bool = False
    ) -> None:
        self.network = Network()
        self.spec = spec
        self.layout = layout
        self.shards = shards
        self.count = spec.servers.partitions
        self.master = Master(self.count)
        self.processes: dict[tuple[int, int], PartitionService] = {}  # by partition and attempt
        self.zombies: list[PartitionService] = []
        self.committed: dict[int, float] = {}  # step -> norm, as anybody carried it out
        for index in range(self.count):
            self._start(index, 1)
            if standbys:
                self.place_standby(index)

    def _start(self, index: int, attempt: int) -> None:
        self.processes[index, attempt] = played_partition(self.network, self.spec, index, attempt=attempt)

    def _start_next(self, index: int) -> int:
        self.master.attempts[index] += 1
        self._start(index, self.master.attempts[index])
        return self.master.attempts[index]

    def partition(self, index: int) -> PartitionService:
        """Who holds the partition by the newest plan."""
        return self.processes[index, self.master.partitions[index]]

    @property
    def partitions(self) -> list[PartitionService]:
        return [self.partition(index) for index in range(self.count)]

    def standby(self, index: int) -> PartitionService | None:
        return self.processes.get((index, self.master.standbys[index]))

    # ---- the master ----

    def place_standby(self, index: int) -> None:
        """A new standby process; the next plan names it."""
        if not self.master.standbys[index]:
            self.master.standbys[index] = self._start_next(index)

    def publish(self, *, restore: bool = False) -> None:
        """A new plan; each process receives it when it adopts."""
        m = self.master
        m.generation += 1
        if restore:
            m.restored = m.generation
            m.restores += 1
            m.synced = [False] * self.count
            self.committed.clear()
        self.plan: Plan = played_plan(
            self.layout, self.shards, generation=m.generation, partitions=self.count, restore_generation=m.restored,
            final_step=self.spec.train.max_steps, moved_generation=m.moved, coordinator_generation=m.led,
        )  # fmt: skip
        for index, placement in enumerate(self.plan.partitions):
            self._name(placement, index, m.partitions[index])
            if m.standbys[index]:
                self._name(placement.standby, index, m.standbys[index])

    def _name(self, placement: Any, index: int, attempt: int) -> None:
        placement.attempt = attempt
        placement.addresses[:] = [f"{kind}:partition:{index}:{attempt}" for kind in ("unix", "tcp")]

    def hear_reports(self) -> None:
        """What partitions reported of their standbys, as the master counts it."""
        m = self.master
        for (index, attempt), service in list(self.processes.items()):
            link: Any = service.link
            said = link.reported("standby_state")
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
            dismiss(self._remove(index, m.standbys[index]))
            m.standbys[index], m.synced[index] = 0, False
            self.publish()

    def lose_partition(self, index: int, *, lives_on: bool = False) -> None:
        """The partition is gone, or the master believes so: its standby takes over, or all go back."""
        m = self.master
        self.hear_reports()
        gone = self._remove(index, m.partitions[index])
        if lives_on:
            self.zombies.append(gone)
        else:
            dismiss(gone)
        synced, m.synced[index] = m.synced[index], False
        if m.standbys[index]:
            m.partitions[index], m.standbys[index] = m.standbys[index], 0
        else:
            m.partitions[index] = self._start_next(index)
        if synced:
            m.takeovers += 1
            m.moved = m.generation + 1
            m.led = m.moved if index == 0 else m.led
        self.publish(restore=not synced)

    def crash(self, index: int) -> None:
        """The partition is gone, and whatever its standby has, all go back."""
        dismiss(self._remove(index, self.master.partitions[index]))
        self.master.partitions[index] = self._start_next(index)
        self.publish(restore=True)

    def _remove(self, index: int, attempt: int) -> PartitionService:
        del self.network.listeners[f"partition:{index}:{attempt}"]
        return self.processes.pop((index, attempt))

    # ---- processes ----

    def members(self) -> list[Any]:
        """Whoever adopts plans."""
        return [service for _, service in sorted(self.processes.items())]

    def adopt(self, number: int) -> None:
        """One of the processes receives the newest plan."""
        members = self.members()
        members[number % len(members)].adopt(self.plan)

    def everybody_adopts(self) -> None:
        for number in range(len(self.members())):
            self.adopt(number)

    def cut(self, choice: int) -> None:
        if self.network.connections:
            self.network.connections[choice % len(self.network.connections)].close(None)

    def check(self) -> None:
        """Nobody is two steps ahead, and each step has one decision, which holds until a restore."""
        voting = [p for p in self.partitions if p.plan and p.standby is None]
        for generation in {p.plan.restore_generation for p in voting if p.plan}:
            steps = [p.member.step for p in voting if p.plan and p.plan.restore_generation == generation]
            assert max(steps) - min(steps) <= 1, f"two steps apart since restore {generation}: {steps}"
        for p in self.current():
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
        assert [error for error in self.network.refused if error.code != "PS-3002"] == []

    def current(self) -> list[PartitionService]:
        """Partitions and standbys that have a plan since the newest restore."""
        return [p for p in self.processes.values() if p.plan and p.plan.restore_generation == self.master.restored]

    def close(self) -> None:
        for service in (*self.processes.values(), *self.zombies):
            dismiss(service)
