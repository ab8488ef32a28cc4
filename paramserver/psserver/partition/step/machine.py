"""The step of a partition as a state machine: events in, actions out. No sockets, clocks or callbacks.

vote              -> SendVote (a standby: SendHeld)
receive_decision  -> ReplicateDecision, OpenNextStep
open_next, apply  -> ApplyBucket, bucket by bucket; after the last one:
                     ServePulls, WriteSnapshot, SyncStandby, ReplayEarly, TryVote"""

from __future__ import annotations

from dataclasses import replace

from psserver.partition import actions
from psserver.partition.actions import Action
from psserver.partition.step import voting
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.voting import CommitDecision, Member, Vote


class StepMachine:
    """`step`: the open step's sums; None before the first plan, and while a snapshot cannot be read.
    `member`: vote and last decision. `decision`: the one being carried out; None between two steps.
    `version`: the newest committed version whose update is done; `versions`: that of each bucket."""

    def __init__(self, partition: int) -> None:
        self.stands_by = False
        self.step: OpenStep | None = None
        self.member = Member(generation=0, step=0)
        self.decision: CommitDecision | None = None
        self.version = 0
        self.versions: dict[int, int] = {}
        self.progress = 0  # rises with every bucket that is updated
        self._partition = partition

    @property
    def is_updating(self) -> bool:
        """Whether a decision is being carried out: the state is of no step."""
        return self.decision is not None

    def restart(self, step: OpenStep, generation: int, version: int, last: CommitDecision | None = None) -> None:
        """Drop every sum and vote: the values are, or will be, those of `version`, which `last` made."""
        self.decision = None
        self.step = step
        self.member = Member(generation=generation, step=version, last_decision=last)
        self.version = version
        self.versions = {span.bucket: version for span in step.state.spans}

    def adopt(self, generation: int) -> None:
        """A new generation without a restore: the vote on the open step holds under it."""
        self.member = voting.member_adopts(self.member, generation)

    def is_complete(self) -> bool:
        """Whether nothing of the open step itself keeps this partition from voting."""
        if self.step is None or self.member.vote is not None or self.decision is not None:
            return False
        return self.step.is_complete

    def vote(self) -> list[Action]:
        """Vote on the open step, which is complete."""
        assert self.step is not None
        squares, finite = self.step.make_vote()
        member = self.member
        vote = Vote(
            generation=member.generation, step=member.step, partition=self._partition, squares=squares, finite=finite
        )
        self.member = replace(member, vote=vote)
        return self.vote_again()

    def vote_again(self) -> list[Action]:
        """Repeat the vote on the open step, if there is one."""
        if self.member.vote is None:
            return []
        return [actions.SendHeld()] if self.stands_by else [actions.SendVote(self.member.vote)]

    def receive_decision(self, decision: CommitDecision) -> list[Action]:
        """The coordinator's decision, or the primary's; one that does not fit is dropped."""
        self.member, now = voting.receive_decision(self.member, decision)
        if not now or decision.kind == "stop":
            return []
        self.decision = decision
        return [actions.ReplicateDecision(decision), actions.OpenNextStep(decision)]

    def open_next(self, decision: CommitDecision) -> list[Action]:
        """The sums become updates, or are dropped; the next step begins empty."""
        assert self.step is not None
        self.step.decide(decision)
        return self.next_update()

    def next_update(self) -> list[Action]:
        """The next bucket to be applied, or what follows the last one; nothing when a restore came in between."""
        if self.step is None or self.decision is None:
            return []
        bucket = self.step.next_update()
        return self._close_step(self.decision) if bucket is None else [actions.ApplyBucket(bucket)]

    def apply(self, bucket: int) -> list[Action]:
        """Run the optimizer over the bucket, which is the next (CPU-bound, about a millisecond a MiB)."""
        assert self.step is not None and self.decision is not None
        self.progress += 1
        self.step.update()
        self.versions[bucket] = self.decision.step + 1
        return self.next_update()

    def _close_step(self, decision: CommitDecision) -> list[Action]:
        self.version = decision.step + 1
        self.versions = dict.fromkeys(self.versions, self.version)
        self.decision = None
        if self.stands_by:
            return [actions.ServePulls(), actions.ResumeReading(), actions.TryVote()]
        snapshot: list[Action] = [actions.WriteSnapshot(decision.last)] if decision.snapshot else []
        # A fast trainer may have completed the next step before this one was put away.
        return [actions.ServePulls(), *snapshot, actions.SyncStandby(), actions.ReplayEarly(), actions.TryVote()]
