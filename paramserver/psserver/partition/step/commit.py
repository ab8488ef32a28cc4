"""Vote and commit: how a step happens in every partition or in none, as pure state machines.

A partition votes once all its buckets are complete; the lead, holding a vote from every partition, decides and tells
all. Votes are pure functions of the step, so a vote may be repeated at will: each member keeps its last vote, the
lead its last verdict, and both are sent again when a generation begins or a connection comes back. Votes of another
generation are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

DecisionKind = Literal["commit", "skip", "stop"]


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One partition's word on the open step. `squares`: the sum of squares of each of its blocks of trained buckets,
    keyed by global block number; `finite`: every sum in them, and in its averaged buffers, is a finite number."""

    generation: int
    step: int
    partition: int
    squares: Mapping[int, float] = field(default_factory=dict)
    finite: bool = True


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of a step. `scale` multiplies the summed gradient; `norm` is the mean gradient's, before clipping.

    `snapshot`: the version it makes is to be written; `last`: training ends with it.
    """

    generation: int
    step: int
    kind: DecisionKind
    scale: float = 1.0
    norm: float = 0.0
    snapshot: bool = False
    last: bool = False


@dataclass(frozen=True, kw_only=True)
class CoordinatorState:
    """The lead's state: `step` is the version that the open step starts from."""

    num_partitions: int
    generation: int
    step: int
    votes: Mapping[int, Vote] = field(default_factory=dict)
    last: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class Member:
    """A partition's state: the version it holds, and its vote on the open step once it has one. A standby's is that of
    its partition; it votes to it."""

    generation: int
    step: int
    vote: Vote | None = None
    last_verdict: Verdict | None = None


Decide = Callable[[Mapping[int, Vote]], Verdict]


def receive_vote(lead: CoordinatorState, vote: Vote, decide: Decide) -> tuple[CoordinatorState, Verdict | None, bool]:
    """The lead takes a vote: its new state, a verdict to send if there is one, and whether to send it to all.

    A vote on the step that was just decided is answered with that verdict, to its sender alone.
    """
    if vote.generation != lead.generation:
        return lead, None, False
    if lead.last is not None and vote.step == lead.last.step:
        return lead, replace(lead.last, generation=lead.generation), False
    if vote.step != lead.step:
        return lead, None, False
    votes = {**lead.votes, vote.partition: vote}
    if len(votes) < lead.num_partitions:
        return replace(lead, votes=votes), None, False
    verdict = decide(votes)
    return replace(lead, step=lead.step + 1, votes={}, last=verdict), verdict, True


def lead_adopts(lead: CoordinatorState, generation: int) -> CoordinatorState:
    """A new generation begins at the same step: votes are collected anew."""
    return replace(lead, generation=generation, votes={})


def lead_learns(lead: CoordinatorState, verdict: Verdict) -> tuple[CoordinatorState, Verdict | None]:
    """A member tells the lead, which has taken over, what the lead before it decided: its new state, and the verdict to
    send to all if it is the one on the open step.

    Nobody can have decided otherwise: that would have taken this member's vote under the new generation."""
    if verdict.step != lead.step:
        return lead, None
    verdict = replace(verdict, generation=lead.generation)
    return replace(lead, step=lead.step + 1, votes={}, last=verdict), verdict


def cast_vote(member: Member, vote: Vote) -> Member:
    """The partition's buckets are complete: it votes."""
    return replace(member, vote=vote)


def member_adopts(member: Member, generation: int) -> Member:
    """A new generation begins: the vote on the open step, being pure, is cast again under it."""
    vote = replace(member.vote, generation=generation) if member.vote else None
    return replace(member, generation=generation, vote=vote)


def receive_verdict(member: Member, verdict: Verdict) -> tuple[Member, bool]:
    """A partition hears a verdict: its new state, and whether to carry it out now.

    One of another generation, on another step, or on a step it has not voted on is not carried out.
    """
    fits = verdict.generation == member.generation and verdict.step == member.step
    if not fits or member.vote is None:
        return member, False
    return replace(member, step=member.step + 1, vote=None, last_verdict=verdict), True


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
