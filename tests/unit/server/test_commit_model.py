"""A model check of vote and commit: every order of events in a small job, with crashes and late or lost messages.

The decisions are the real ones (`psserver.partition.step.voting`). What surrounds them is modelled after the
partition's process, the coordinator and its client: who sends what to whom, when connections are lost and what is said
again after. A message waits until it is delivered, in any order, perhaps twice, or until its receiver starts another
restore or the connection is lost. A plan reaches each partition at a time of its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import pytest

from harness.model_check import Model, explore, put
from harness.wrong_decisions import forgets_decisions, keeps_its_old_vote
from psserver.partition.step import voting
from psserver.partition.step.voting import CommitDecision, CoordinatorState, Member, Vote


class Plan(NamedTuple):
    generation: int
    restored: int  # the generation that ordered the newest restore
    resume: int


class Message(NamedTuple):
    kind: str  # "vote" and "join" to the coordinator, "decision" and "call" to a member
    partition: int  # the member at one end
    generation: int = 0
    step: int = 0
    norm: float = 0.0


class World(NamedTuple):
    """One state of the job. `members[p]` is None while partition p has no plan; a coordinator is partition 0's."""

    plan: Plan
    complete: int  # step of the newest complete snapshot
    parts: frozenset[tuple[int, int]]  # (step, partition) since the restore, not complete yet
    faults: tuple[int, int, int, int]  # still to come: new generations, crashes, lost connections, repeats
    members: tuple[Member | None, ...]
    restores: tuple[int, ...]  # the generation whose restore each has carried out; 0: none
    coordinator: CoordinatorState | None
    joined: frozenset[int]
    is_open: bool
    messages: frozenset[Message]
    up: tuple[tuple[bool, bool], ...]  # does member p, does the coordinator, hold their connection for open


def _said(decision: CommitDecision | None) -> tuple[int, float] | None:
    return decision and (decision.step, decision.norm)


NEW_GENERATIONS, CRASHES, CUTS, REPEATS = range(4)


def beginning(num_partitions: int, faults: tuple[int, int, int, int]) -> World:
    """The first plan is out; nobody has heard of it."""
    return World(
        plan=Plan(1, 1, 0), complete=0, parts=frozenset(), faults=faults, members=(None,) * num_partitions,
        restores=(0,) * num_partitions, coordinator=None, joined=frozenset(), is_open=False, messages=frozenset(),
        up=((False, False),) * num_partitions,
    )  # fmt: skip


class CommitModel(Model[World]):
    """Vote and commit, between partitions that may crash and connections that may be lost."""

    def key(self, w: World) -> Hashable:
        """The state without what the decisions cannot see, hashable."""
        coordinator = w.coordinator and (
            w.coordinator.generation,
            w.coordinator.step,
            frozenset(w.coordinator.votes),
            _said(w.coordinator.last),
        )
        members = tuple(
            m and (m.generation, m.step, m.vote and m.vote.generation, _said(m.last_decision)) for m in w.members
        )
        return (*w[:4], members, w.restores, coordinator, *w[7:])

    def is_over(self, w: World) -> bool:
        return all(
            m is not None and m.step == self.steps and m.generation == w.plan.generation and t == w.plan.restored
            for m, t in zip(w.members, w.restores, strict=True)
        )

    # ---- what happens by itself, sooner or later ----

    def progress(self, w: World) -> Iterator[World]:
        for p, member in enumerate(w.members):
            if member is None or member.generation < w.plan.generation:
                yield self.adopt(w, p)
            if member is not None and self.can_complete(w, p, member):
                yield self.vote(w, p, member)
            yield from self.connections(w, p)
        for message in w.messages:
            yield self.deliver(w._replace(messages=w.messages - {message}), message)

    def can_complete(self, w: World, p: int, member: Member) -> bool:
        """Trainers push a step once the coordinator asks for it and every partition has given them its version."""
        if member.vote is not None or member.step >= self.steps or w.coordinator is None or not w.is_open:
            return False
        together = all(
            other is not None and restore_generation == w.restores[p] and other.step >= member.step
            for other, restore_generation in zip(w.members, w.restores, strict=True)
        )
        return together and w.coordinator.step >= member.step

    def connections(self, w: World, p: int) -> Iterator[World]:
        """Member p hears that its connection is gone; or dials again, is welcomed, joins, and repeats its vote."""
        mine, theirs = w.up[p]
        if p == 0:
            return
        if mine and not theirs:
            yield w._replace(up=put(w.up, p, (False, False)))
        member = w.members[p]
        same = w.coordinator is not None and w.restores[p] == w.restores[0]
        if member is not None and not mine and same:
            w = w._replace(up=put(w.up, p, (True, True)))
            w = self.to_coordinator(w, p, Message("join", p, step=member.step))
            yield self.cast(w, p)

    # ---- what a fault does ----

    def disturbances(self, w: World) -> Iterator[World]:
        if w.faults[NEW_GENERATIONS]:
            plan = w.plan._replace(generation=w.plan.generation + 1)
            yield self.spend(w, NEW_GENERATIONS)._replace(plan=plan)
        for p in range(len(w.members)):
            if w.faults[CRASHES] and w.members[p] is not None:
                yield self.crash(self.spend(w, CRASHES), p)
            if w.faults[CUTS] and p and w.up[p][0]:
                left = frozenset(m for m in w.messages if m.partition != p)
                yield self.spend(w, CUTS)._replace(messages=left, up=put(w.up, p, (False, False)))
        if w.faults[REPEATS]:
            for message in w.messages:
                yield self.deliver(self.spend(w, REPEATS), message)

    def spend(self, w: World, fault: int) -> World:
        return w._replace(faults=put(w.faults, fault, w.faults[fault] - 1))

    def crash(self, w: World, p: int) -> World:
        """The partition is gone; the master has all of them go back, once its replacement listens."""
        w = self.forget(w._replace(members=put(w.members, p, None), restores=put(w.restores, p, 0)), p)
        generation = w.plan.generation + 1
        plan = Plan(generation, generation, w.complete)
        return w._replace(plan=plan, parts=frozenset())

    def forget(self, w: World, p: int) -> World:
        """Partition p closes its connections; what was on its way to it is gone, what it had sent is not."""
        if p == 0:
            messages = frozenset(m for m in w.messages if m.kind in ("decision", "call"))
            up = tuple((mine, False) for mine, _ in w.up)
            return w._replace(messages=messages, up=up, coordinator=None, joined=frozenset(), is_open=False)
        messages = frozenset(m for m in w.messages if m.partition != p or m.kind in ("vote", "join"))
        return w._replace(messages=messages, up=put(w.up, p, (False, w.up[p][1])))

    # ---- the service ----

    def adopt(self, w: World, p: int) -> World:
        """`PartitionService.adopt`."""
        plan, member = w.plan, w.members[p]
        if member is None or w.restores[p] != plan.restored:
            w = self.forget(w, p)
            w = w._replace(
                members=put(w.members, p, Member(generation=plan.generation, step=plan.resume)),
                restores=put(w.restores, p, plan.restored),
            )
            if p == 0:
                coordinator = CoordinatorState(
                    num_partitions=len(w.members), generation=plan.generation, step=plan.resume
                )
                w = self.join(w._replace(coordinator=coordinator), 0, plan.resume)
            return w
        w = w._replace(members=put(w.members, p, voting.member_adopts(member, plan.generation)))
        if p == 0 and w.coordinator is not None:
            w = w._replace(coordinator=voting.coordinator_adopts(w.coordinator, plan.generation))
            if w.is_open:
                for index in sorted(w.joined):
                    w = self.to_member(w, index, Message("call", index))
        return self.cast(w, p)

    def vote(self, w: World, p: int, member: Member) -> World:
        """`try_vote`: every bucket of the open step is complete."""
        vote = Vote(generation=member.generation, step=member.step, partition=p)
        return self.cast(w._replace(members=put(w.members, p, replace(member, vote=vote))), p)

    def cast(self, w: World, p: int) -> World:
        """`_send_vote`."""
        member = w.members[p]
        if member is None or member.vote is None:
            return w
        if p == 0:
            return self.take_vote(w, member.vote)
        return self.to_coordinator(w, p, Message("vote", p, member.vote.generation, member.vote.step))

    def hear(self, w: World, p: int, decision: CommitDecision) -> World:
        """`receive_decision`; the step is made at once, and its snapshot is written."""
        member = w.members[p]
        assert member is not None
        member, now = voting.receive_decision(member, decision)
        w = w._replace(members=put(w.members, p, member))
        if not now or w.restores[p] != w.plan.restored:
            return w
        parts = w.parts | {(member.step, p)}
        is_whole = all((member.step, q) in parts for q in range(len(w.members)))
        return w._replace(parts=parts, complete=max(w.complete, member.step) if is_whole else w.complete)

    def deliver(self, w: World, message: Message) -> World:
        p = message.partition
        if message.kind == "join":
            return self.join(w, p, message.step)
        if message.kind == "vote":
            return self.take_vote(w, Vote(generation=message.generation, step=message.step, partition=p))
        if message.kind == "call":
            return self.cast(w, p)
        decision = CommitDecision(generation=message.generation, step=message.step, kind="commit", norm=message.norm)
        return self.hear(w, p, decision)

    # ---- the coordinator ----

    def join(self, w: World, p: int, step: int) -> World:
        """`CoordinatorState.join`."""
        assert w.coordinator is not None
        w = w._replace(joined=w.joined | {p})
        if step == w.coordinator.step - 1:
            w = self.to_member(w, p, Message("call", p))
        return w._replace(is_open=w.is_open or len(w.joined) == len(w.members))

    def take_vote(self, w: World, vote: Vote) -> World:
        """`CoordinatorState.vote`; the decision depends on when it was reached, so that two of one step would
        differ."""
        coordinator = w.coordinator
        assert coordinator is not None

        def decide(votes: Mapping[int, Vote]) -> CommitDecision:
            assert {v.step for v in votes.values()} == {coordinator.step}, "votes on other steps"
            assert {v.generation for v in votes.values()} == {coordinator.generation}, "votes of other generations"
            return CommitDecision(
                generation=coordinator.generation,
                step=coordinator.step,
                kind="commit",
                norm=float(coordinator.generation),
            )

        state, decision, to_all = voting.receive_vote(coordinator, vote, decide)
        w = w._replace(coordinator=state)
        if decision is None:
            return w
        for index in range(len(w.members)) if to_all else (vote.partition,):
            if index == 0:
                w = self.hear(w, 0, decision)
            else:
                reported = Message("decision", index, decision.generation, decision.step, decision.norm)
                w = self.to_member(w, index, reported)
        return w

    # ---- connections ----

    def to_coordinator(self, w: World, p: int, message: Message) -> World:
        return w._replace(messages=w.messages | {message}) if all(w.up[p]) else w

    def to_member(self, w: World, p: int, message: Message) -> World:
        return w._replace(messages=w.messages | {message}) if all(w.up[p]) else w

    def check(self, w: World) -> None:
        """What must hold in every state."""
        for restore_generation in set(w.restores) - {0}:
            held = [m for m, t in zip(w.members, w.restores, strict=True) if m is not None and t == restore_generation]
            steps = [member.step for member in held]
            assert max(steps) - min(steps) <= 1, f"two steps apart: {w}"
            decisions = {(m.last_decision.step, m.last_decision.norm) for m in held if m.last_decision is not None}
            if w.coordinator is not None and w.restores[0] == restore_generation and w.coordinator.last is not None:
                decisions.add((w.coordinator.last.step, w.coordinator.last.norm))
            assert len({step for step, _ in decisions}) == len(decisions), f"two decisions on one step: {w}"


# (new generations, crashes, lost connections, repeated messages)
CASES = [
    (2, 3, (1, 0, 1, 1)),
    (2, 2, (1, 1, 1, 1)),
    (2, 2, (1, 2, 0, 1)),
    (3, 2, (1, 0, 0, 0)),
    (3, 2, (0, 1, 0, 1)),
    (3, 1, (1, 1, 0, 0)),
    (3, 1, (0, 1, 1, 1)),
    (3, 1, (1, 0, 1, 0)),
]


@pytest.mark.parametrize(("partitions", "steps", "faults"), CASES)
def test_a_job_never_sticks_and_never_comes_apart(
    partitions: int, steps: int, faults: tuple[int, int, int, int]
) -> None:
    visited = explore(beginning(partitions, faults), CommitModel(steps))

    assert visited > 100, "the model went nowhere"


def _keeps_old_votes(coordinator: CoordinatorState, generation: int) -> CoordinatorState:
    return replace(coordinator, generation=generation)


def _obeys_any_decision(member: Member, decision: CommitDecision) -> tuple[Member, bool]:
    return replace(member, step=member.step + 1, vote=None, last_decision=decision), True


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("receive_vote", forgets_decisions),
        ("coordinator_adopts", _keeps_old_votes),
        ("member_adopts", keeps_its_old_vote),
        ("receive_decision", _obeys_any_decision),
    ],
)
def test_the_model_finds_what_is_wrong(name: str, mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: each of these mistakes sticks, or takes partitions or decisions apart."""
    monkeypatch.setattr(voting, name, mistake)

    with pytest.raises(AssertionError, match=r"stuck|apart|two decisions|votes o"):
        explore(beginning(2, (1, 0, 1, 1)), CommitModel(2))
