"""From a complete step to its vote, and from the decision to its update: what a partition does once a step.

every bucket complete -> vote -> decision -> update, bucket by bucket -> the next step
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from pscluster.step.summary import Summary
from pscluster.v1.plan_pb2 import Plan
from psserver.partition.coordinator.coordinator import Coordinator
from psserver.partition.ingress.clients import Clients
from psserver.partition.step import commit
from psserver.partition.step.commit import CommitDecision, Member, Vote
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters

SLICE_S = 0.0015  # of updates, after which trainers hear of them: long enough not to spend it on messages


class Holder(Protocol):
    """What the cycle asks of its partition. Everything on the partition's thread."""

    index: int
    plan: Plan | None
    state: PartitionState | None
    step: OpenStep | None
    member: Member
    versions: dict[int, int]
    version: int
    clients: Clients
    counters: PartitionCounters

    @property
    def coordinator(self) -> Coordinator | None:
        """The coordinator's part, in partition 0."""

    def may_vote(self) -> bool:
        """Whether nothing but the step itself keeps the vote back."""

    def try_vote(self) -> None:
        """Come back to `StepCycle.try_vote`."""

    def send_vote(self) -> None:
        """Cast the vote on the open step, if there is one."""

    def decided(self, decision: CommitDecision, summary: Summary) -> None:
        """A decision is about to be carried out on the step with that summary: its sums are still what they were."""

    def overwriting(self, bucket: int) -> None:
        """A bucket's values are about to change."""

    def serve_pulls(self) -> None:
        """Send what is owed and new enough."""

    def step_done(self, decision: CommitDecision) -> None:
        """The decision is carried out; the next step is open."""


class StepCycle:
    """`decision`: the one being carried out; None between two steps."""

    def __init__(self, holder: Holder, post: Callable[[Callable[[], None]], None]) -> None:
        self.decision: CommitDecision | None = None
        self.progress = 0  # rises with every bucket that is updated
        self._holder = holder
        self._post = post

    def restart(self) -> None:
        """Another timeline: what was begun is dropped."""
        self.decision = None

    def try_vote(self) -> None:
        """Vote if the open step is complete and this partition has not."""
        holder, step = self._holder, self._holder.step
        if step is None or holder.plan is None or holder.member.vote is not None or self.decision is not None:
            return
        if not step.is_complete or not holder.may_vote():
            return
        with holder.counters.phase("vote"):
            squares, finite = step.make_vote()
            if holder.coordinator is not None:
                holder.coordinator.take_summary(step.summary.root)
            vote = Vote(
                generation=holder.plan.generation,
                step=holder.member.step,
                partition=holder.index,
                squares=squares,
                finite=finite,
            )
            holder.member = commit.cast_vote(holder.member, vote)
            holder.send_vote()

    def receive_decision(self, decision: CommitDecision) -> None:
        """Carry out a decision, bucket by bucket, serving connections in between."""
        holder = self._holder
        holder.member, now = commit.receive_decision(holder.member, decision)
        if not now or decision.kind == "stop":
            return
        assert holder.step is not None
        self.decision = decision
        holder.decided(decision, holder.step.summary.root)
        holder.step.decide(decision)
        self._update_next()

    def _update_next(self) -> None:
        """Update buckets for a moment, then let trainers have them and connections have their turn."""
        holder, decision = self._holder, self.decision
        step, state = holder.step, holder.state
        if step is None or state is None or decision is None:
            return  # a restore came in between
        until_s = time.perf_counter() + SLICE_S
        while (bucket := step.next_update()) is not None:
            self.progress += 1
            holder.overwriting(bucket)
            with holder.counters.phase("update"):
                step.update()
            holder.versions[bucket] = decision.step + 1
            if time.perf_counter() >= until_s:
                break
        if step.next_update() is None:
            self._done(decision)
        else:
            holder.serve_pulls()
            self._post(self._update_next)

    def _done(self, decision: CommitDecision) -> None:
        holder = self._holder
        holder.version = decision.step + 1
        holder.versions = dict.fromkeys(holder.versions, holder.version)
        self.decision = None
        holder.serve_pulls()
        holder.step_done(decision)
        holder.try_vote()  # a fast trainer may have completed the next step before this one was put away
