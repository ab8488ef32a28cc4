"""Vote and commit: how a step happens in every partition or in none, as pure state machines.

A partition votes once all its buckets are complete; the coordinator, holding a vote from every partition, decides and
sends the decision to all. Votes are pure functions of the step and may be repeated: each member keeps its last vote,
the coordinator its last decision, and both are sent again with a new generation or connection. Votes of another
generation are dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pscluster.wire.partition_protocol import CommitDecision as CommitDecision
from pscluster.wire.partition_protocol import Vote as Vote


@dataclass(frozen=True, kw_only=True)
class CoordinatorState:
    """The coordinator's state: `step` is the version that the open step starts from."""

    num_partitions: int
    generation: int
    step: int
    votes: Mapping[int, Vote] = field(default_factory=dict)
    last: CommitDecision | None = None


@dataclass(frozen=True, kw_only=True)
class Member:
    """A partition's state: the version it holds, and its vote on the open step once it has one. A standby's is that of
    its partition; it votes to it."""

    generation: int
    step: int
    vote: Vote | None = None
    last_decision: CommitDecision | None = None


Decide = Callable[[Mapping[int, Vote]], CommitDecision]


def receive_vote(
    coordinator: CoordinatorState, vote: Vote, decide: Decide
) -> tuple[CoordinatorState, CommitDecision | None, bool]:
    """The coordinator takes a vote: its new state, a decision to send if there is one, and whether to send it to all.

    A vote on the step that was just decided is answered with that decision, to its sender alone."""
    if vote.generation != coordinator.generation:
        return coordinator, None, False
    if coordinator.last is not None and vote.step == coordinator.last.step:
        return coordinator, replace(coordinator.last, generation=coordinator.generation), False
    if vote.step != coordinator.step:
        return coordinator, None, False
    votes = {**coordinator.votes, vote.partition: vote}
    if len(votes) < coordinator.num_partitions:
        return replace(coordinator, votes=votes), None, False
    decision = decide(votes)
    return replace(coordinator, step=coordinator.step + 1, votes={}, last=decision), decision, True


def coordinator_adopts(coordinator: CoordinatorState, generation: int) -> CoordinatorState:
    """A new generation begins at the same step: votes are collected again."""
    return replace(coordinator, generation=generation, votes={})


def coordinator_learns(
    coordinator: CoordinatorState, decision: CommitDecision
) -> tuple[CoordinatorState, CommitDecision | None]:
    """A member sends a coordinator that has taken over the decision of the one before: the new state, and
    the decision to send to all if it is the one on the open step.

    Nobody can have decided otherwise: that would have taken this member's vote under the new generation."""
    if decision.step != coordinator.step:
        return coordinator, None
    decision = replace(decision, generation=coordinator.generation)
    return replace(coordinator, step=coordinator.step + 1, votes={}, last=decision), decision


def member_adopts(member: Member, generation: int) -> Member:
    """A new generation begins: the vote on the open step, being pure, is cast again under it."""
    vote = replace(member.vote, generation=generation) if member.vote else None
    return replace(member, generation=generation, vote=vote)


def receive_decision(member: Member, decision: CommitDecision) -> tuple[Member, bool]:
    """A partition receives a decision: its new state, and whether to carry it out now.

    One of another generation, on another step, or on a step it has not voted on is not carried out."""
    fits = decision.generation == member.generation and decision.step == member.step
    if not fits or member.vote is None:
        return member, False
    return replace(member, step=member.step + 1, vote=None, last_decision=decision), True


def global_norm(votes: Mapping[int, Vote], weight: float) -> float:
    """Norm of the mean gradient: the blocks' sums added in block order in float64, whatever partition held them."""
    squares: dict[int, float] = {}
    for vote in votes.values():
        squares.update(vote.squares)
    total = 0.0
    for block in sorted(squares):
        total += squares[block]
    return math.sqrt(total) / weight if weight > 0 else 0.0


def clip_coefficient(norm: float, clip_norm: float | None) -> float:
    """min(1, clip_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
