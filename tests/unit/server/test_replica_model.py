"""A model check of partitions with standbys: every order of events in a small job, with deaths, false deaths and cuts.

The decisions are the real ones (`psserver.partition.step.voting` and `sync`); what surrounds them is modelled
after the service, the coordinator, the replication and the master. A stream between partition and standby keeps its
order, and a vote comes after the join; decisions and words to the master arrive in any order. Plans reach each process
at a time of its own. Who was taken for dead may live on, with its older plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from harness.model_check import Model, explore, put
from harness.wrong_decisions import forgets_decisions, keeps_former_acks, never_requires_acks, reports_at_once
from psserver.partition.replication import in_sync
from psserver.partition.replication.in_sync import InSyncState
from psserver.partition.step import voting
from psserver.partition.step.voting import CommitDecision, CoordinatorState, Member, Vote


class Plan(NamedTuple):
    generation: int
    restored: int
    holders: tuple[int, ...]  # attempts of the partitions
    standbys: tuple[int, ...]  # of their standbys


class Leads(NamedTuple):
    """`voting.Coordinator`, hashable, and who has joined it."""

    step: int
    votes: frozenset[int] = frozenset()
    last: int = -1
    joined: frozenset[int] = frozenset()
    is_open: bool = False


class Process(NamedTuple):
    """A partition's or standby's process. `full`: the sums of its open step are complete. `last`: the step of its last
    decision. `stands_by` by its own plan; `synced`: and it was given a state. `joined`: the coordinator's attempt that
    it is connected to."""

    index: int
    attempt: int
    plan: Plan = Plan(0, 0, (), ())
    step: int = 0
    full: bool = False
    voted: bool = False
    last: int = -1
    stands_by: bool = False
    synced: bool = False
    sync: InSyncState = InSyncState()
    joined: int = 0
    coordinator: Leads | None = None

    @property
    def acked_version(self) -> int:
        return self.step + self.full


class Link(NamedTuple):
    """A stream from one attempt to another, and what the latter answers."""

    sender: int
    receiver: int
    down: tuple[tuple[str, int, int], ...] = ()
    up: tuple[int, ...] = ()


class World(NamedTuple):
    plan: Plan
    believed: tuple[bool, ...]  # what the master believes to be in sync
    newest: tuple[int, ...]  # attempts, by partition
    processes: frozenset[Process]
    links: tuple[Link | None, ...]
    messages: frozenset[tuple[Any, ...]]
    decided: int  # the version that somebody was told is committed since the restore
    faults: tuple[int, int, int, int, int]


CRASHES, SUSPICIONS, STANDBY_CRASHES, CUTS, PLANS = range(5)


def beginning(with_standby: tuple[bool, ...], faults: tuple[int, int, int, int, int]) -> World:
    """The first plan is out, nobody has heard of it; which partitions have a standby."""
    partitions = len(with_standby)
    plan = Plan(1, 1, (1,) * partitions, tuple(2 * has for has in with_standby))
    processes = {Process(p, 1) for p in range(partitions)} | {
        Process(p, 2) for p in range(partitions) if with_standby[p]
    }
    nobody: tuple[bool, ...] = (False,) * partitions
    return World(plan, nobody, (2,) * partitions, frozenset(processes), (None,) * partitions, frozenset(), 0, faults)


class ReplicaModel(Model[World]):
    """Partitions with standbys, under a master that hears of them late."""

    # ---- looking ----

    def find(self, w: World, index: int, attempt: int) -> Process | None:
        return next((p for p in w.processes if (p.index, p.attempt) == (index, attempt)), None)

    def holders(self, w: World) -> list[Process | None]:
        return [self.find(w, index, attempt) for index, attempt in enumerate(w.plan.holders)]

    def is_over(self, w: World) -> bool:
        return all(p is not None and p.step == self.steps and p.plan == w.plan for p in self.holders(w))

    def swap(self, w: World, old: Process, new: Process) -> World:
        return w._replace(processes=w.processes - {old} | {new})

    def count(self, w: World, process: Process, version: int) -> World:
        """Somebody was told that the step to this version is committed."""
        mine = process.plan.restored == w.plan.restored
        return w._replace(decided=max(w.decided, version)) if mine else w

    # ---- what happens by itself ----

    def progress(self, w: World) -> Iterator[World]:
        for process in w.processes:
            named = process.attempt in (w.plan.holders[process.index], w.plan.standbys[process.index])
            if named and process.plan.generation < w.plan.generation:
                yield self.adopt(w, process)
            if self.can_complete(w, process):
                yield self.complete(w, process)
            if self.may_vote(process):
                yield self.vote(w, process)
            if self.can_join(w, process):
                yield self.join(w, process)
        for index in range(len(w.links)):
            yield from self.stream(w, index)
        joining = {m[1:3] for m in w.messages if m[0] == "join"}
        for message in w.messages:
            if message[0] == "vote" and message[1:3] in joining:
                continue  # it came after the join, over the same connection
            yield self.deliver(w._replace(messages=w.messages - {message}), message)

    def can_complete(self, w: World, process: Process) -> bool:
        """Trainers push to whom they take for the partition, a step of which every partition has the version."""
        coordinator = self.find(w, 0, w.plan.holders[0])
        if process.stands_by or not process.plan.generation or process.full or process.step >= self.steps:
            return False
        asked = (
            coordinator is not None
            and coordinator.coordinator is not None
            and coordinator.coordinator.is_open
            and coordinator.coordinator.step >= process.step
        )
        together = all(
            p is not None and not p.stands_by and p.plan.restored == process.plan.restored and p.step >= process.step
            for p in self.holders(w)
        )
        return asked and together

    def complete(self, w: World, process: Process) -> World:
        after = process._replace(full=True)
        return self.send(self.swap(w, process, after), after, ("sums", process.step, -1))

    def may_vote(self, process: Process) -> bool:
        ready = process.full and not process.voted and not process.stands_by
        return ready and in_sync.may_vote(process.sync, process.step)

    def vote(self, w: World, process: Process) -> World:
        after = process._replace(voted=True)
        return self.cast(self.swap(w, process, after), after)

    def cast(self, w: World, process: Process) -> World:
        if not process.voted or process.stands_by:
            return w
        vote = ("vote", process.index, process.joined, process.plan.generation, process.step)
        if process.index == 0:
            return self.take_vote(w, process, vote)
        return w._replace(messages=w.messages | {vote}) if process.joined else w

    # ---- the coordinator ----

    def can_join(self, w: World, process: Process) -> bool:
        """It dials the coordinator of its own plan, which must be that by its own."""
        if process.index == 0 or process.stands_by or not process.plan.generation:
            return False
        attempt = process.plan.holders[0]
        coordinator = self.find(w, 0, attempt)
        fits = (
            coordinator is not None
            and coordinator.coordinator is not None
            and coordinator.plan.restored == process.plan.restored
        )
        known = coordinator is not None and fits and coordinator.plan.holders[process.index] == process.attempt
        return process.joined != attempt and known

    def join(self, w: World, process: Process) -> World:
        after = process._replace(joined=process.plan.holders[0])
        reported = ("join", after.index, after.joined, after.step, after.last)
        return self.cast(self.swap(w, process, after)._replace(messages=w.messages | {reported}), after)

    def take_join(self, w: World, index: int, attempt: int, step: int, last: int) -> World:
        process = self.find(w, 0, attempt)
        if process is None or process.coordinator is None:
            return w
        coordinator = process.coordinator._replace(joined=process.coordinator.joined | {index})
        coordinator = coordinator._replace(
            is_open=coordinator.is_open or len(coordinator.joined) == len(w.plan.holders)
        )
        after = process._replace(coordinator=coordinator)
        w = self.swap(w, process, after)
        if step == coordinator.step - 1:
            return w._replace(messages=w.messages | {("call", index, attempt)})
        if step == coordinator.step + 1 and last >= 0:
            state, decision = voting.coordinator_learns(self.coordinator_of(w, after), self.decision(after, last))
            if decision is not None:
                return self.tell_all(w, after, state, decision)
        return w

    def coordinator_of(self, w: World, process: Process) -> CoordinatorState:
        assert process.coordinator is not None
        generation = process.plan.generation
        votes = {
            p: Vote(generation=generation, step=process.coordinator.step, partition=p)
            for p in process.coordinator.votes
        }
        last = self.decision(process, process.coordinator.last) if process.coordinator.last >= 0 else None
        return CoordinatorState(
            num_partitions=len(w.plan.holders),
            generation=generation,
            step=process.coordinator.step,
            votes=votes,
            last=last,
        )

    def decision(self, process: Process, step: int) -> CommitDecision:
        return CommitDecision(generation=process.plan.generation, step=step, kind="commit")

    def take_vote(self, w: World, process: Process, message: tuple[Any, ...]) -> World:
        _, index, _, generation, step = message
        assert process.coordinator is not None

        def decide(votes: Mapping[int, Vote]) -> CommitDecision:
            assert len(votes) == len(w.plan.holders)
            return self.decision(process, step)

        vote = Vote(generation=generation, step=step, partition=index)
        state, decision, to_all = voting.receive_vote(self.coordinator_of(w, process), vote, decide)
        if decision is not None and to_all:
            return self.tell_all(w, process, state, decision)
        after = process._replace(
            coordinator=process.coordinator._replace(votes=frozenset(state.votes), step=state.step)
        )
        w = self.swap(w, process, after)
        if decision is None:
            return w
        if index == 0:
            return self.hear(w, after, decision)
        reported = ("decision", index, after.attempt, decision.generation, decision.step)
        return w._replace(messages=w.messages | {reported})

    def tell_all(self, w: World, process: Process, state: CoordinatorState, decision: CommitDecision) -> World:
        assert process.coordinator is not None
        coordinator = process.coordinator._replace(step=state.step, votes=frozenset(), last=decision.step)
        after = process._replace(coordinator=coordinator)
        w = self.count(self.swap(w, process, after), after, decision.step + 1)
        reported = {
            ("decision", index, after.attempt, decision.generation, decision.step)
            for index in range(1, len(w.plan.holders))
        }
        return self.hear(w._replace(messages=w.messages | reported), after, decision)

    def hear(self, w: World, process: Process, decision: CommitDecision) -> World:
        """Carry out a decision, if it is on the step that was voted on, under this generation."""
        vote = Vote(generation=process.plan.generation, step=process.step, partition=process.index)
        member = Member(generation=process.plan.generation, step=process.step, vote=vote if process.voted else None)
        member, now = voting.receive_decision(member, decision)
        if not now:
            return w
        after = process._replace(step=member.step, full=False, voted=False, last=decision.step)
        w = self.count(self.swap(w, process, after), after, member.step)
        return self.send(w, after, ("decision", decision.step, -1))

    def deliver(self, w: World, message: tuple[Any, ...]) -> World:
        kind, index, attempt = message[:3]
        if kind == "join":
            return self.take_join(w, index, attempt, *message[3:])
        if kind == "in sync":
            standby, restored = message[3:]
            m = w.plan
            holds = (m.holders[index], m.standbys[index], m.restored) == (attempt, standby, restored)
            return w._replace(believed=put(w.believed, index, True)) if holds else w
        if kind == "vote":
            coordinator = self.find(w, 0, attempt)
            return (
                w if coordinator is None or coordinator.coordinator is None else self.take_vote(w, coordinator, message)
            )
        for process in sorted(w.processes, key=lambda p: p.attempt):  # who was replaced and lives on hears it, too
            if process.index == index and process.joined == attempt and not process.stands_by:
                if kind == "call":
                    w = self.cast(w, process)
                else:
                    w = self.hear(w, process, CommitDecision(generation=message[3], step=message[4], kind="commit"))
        return w

    # ---- the stream ----

    def send(self, w: World, process: Process, item: tuple[str, int, int]) -> World:
        link = w.links[process.index]
        if link is None or link.sender != process.attempt:
            return w
        return w._replace(links=put(w.links, process.index, link._replace(down=(*link.down, item))))

    def stream(self, w: World, index: int) -> Iterator[World]:
        link = w.links[index]
        if link is None:
            yield from self.connect(w, index)
            return
        sender, receiver = self.find(w, index, link.sender), self.find(w, index, link.receiver)
        if link.down and receiver is not None and receiver.stands_by:
            item, rest = link.down[0], link._replace(down=link.down[1:])
            yield self.receive(w, receiver, item, rest)
        if link.up and sender is not None:
            acked_version, rest = link.up[0], link._replace(up=link.up[1:])
            yield self.acknowledged(w._replace(links=put(w.links, index, rest)), sender, acked_version)

    def connect(self, w: World, index: int) -> Iterator[World]:
        """A partition dials the standby of its plan, which takes it for its partition by its own."""
        for sender in w.processes:
            if sender.index != index or sender.stands_by or not sender.plan.generation:
                continue
            standby = self.find(w, index, sender.plan.standbys[index])
            fits = standby is not None and standby.stands_by and standby.plan.holders[index] == sender.attempt
            if standby is None or not fits or standby.plan.restored != sender.plan.restored:
                continue
            sums = (("sums", sender.step, -1),) if sender.full else ()
            acked_version = standby.acked_version if standby.synced else -1
            if in_sync.resumes(sender.sync, acked_version, standby.step, sender.step):
                missed = (("decision", sender.last, -1),) if standby.step < sender.step else ()
                link = Link(sender.attempt, standby.attempt, (*missed, *sums), (acked_version,))
            else:
                anew = in_sync.begin(sender.sync)
                assert anew is not None, f"what the standby held is gone: {sender} {standby}"
                w = self.swap(w, sender, sender._replace(sync=anew))
                link = Link(sender.attempt, standby.attempt, (("state", sender.step, sender.last), *sums))
            yield w._replace(links=put(w.links, index, link))

    def receive(self, w: World, standby: Process, item: tuple[str, int, int], link: Link) -> World:
        kind, step, last = item
        after, says = standby, None
        if kind == "state":
            after, says = standby._replace(step=step, last=last, synced=True, full=False, voted=False), step
        elif kind == "sums" and standby.synced and step == standby.step and not standby.full:
            after, says = standby._replace(full=True, voted=True), step + 1
        elif kind == "decision" and standby.synced and step == standby.step and standby.voted:
            after = standby._replace(step=step + 1, full=False, voted=False, last=step)
        if says is not None:
            link = link._replace(up=(*link.up, says))
        return self.swap(w, standby, after)._replace(links=put(w.links, standby.index, link))

    def acknowledged(self, w: World, process: Process, acked_version: int) -> World:
        held, reports = in_sync.acknowledge(process.sync, acked_version, process.step + process.voted)
        after = process._replace(sync=held)
        w = self.swap(w, process, after)
        if not reports:
            return w
        word = ("in sync", after.index, after.attempt, held.attempt, after.plan.restored)
        return w._replace(messages=w.messages | {word})

    # ---- plans ----

    def adopt(self, w: World, process: Process) -> World:
        plan, index = w.plan, process.index
        stands_by = process.attempt == plan.standbys[index]
        if process.plan.restored != plan.restored:
            return self.begin_anew(w, process, stands_by)
        takes_over = process.stands_by and not stands_by
        if takes_over:
            assert process.synced, "it is to take over and holds nothing"
            w = self.hang_up(w, process)
        held = in_sync.adopt(process.sync, plan.standbys[index], restored=takes_over)
        if held != process.sync and not stands_by:
            w = self.hang_up(w, process)
        joined = process.joined if plan.holders[0] == process.joined else 0
        coordinator = process.coordinator
        if takes_over and index == 0:
            coordinator = Leads(
                step=process.step, last=process.last, joined=frozenset({0}), is_open=len(plan.holders) == 1
            )
        elif coordinator is not None:
            coordinator = coordinator._replace(
                votes=frozenset(), step=voting.coordinator_adopts(self.coordinator_of(w, process), 0).step
            )
        after = process._replace(plan=plan, stands_by=stands_by, sync=held, joined=joined, coordinator=coordinator)
        w = self.swap(w, process, after)
        if after.coordinator is not None and after.coordinator.is_open:
            calls = {("call", other, after.attempt) for other in after.coordinator.joined if other}
            w = w._replace(messages=w.messages | calls)
        return self.cast(w, after)

    def begin_anew(self, w: World, process: Process, stands_by: bool) -> World:
        index, partitions = process.index, len(w.plan.holders)
        leads = index == 0 and not stands_by
        after = Process(
            index, process.attempt, plan=w.plan, stands_by=stands_by,
            sync=InSyncState() if stands_by else InSyncState(attempt=w.plan.standbys[index]),
            coordinator=Leads(step=0, joined=frozenset({0}), is_open=partitions == 1) if leads else None,
        )  # fmt: skip
        to_coordinator, from_coordinator = ("join", "vote"), ("decision", "call")
        over = {m for m in w.messages if m[2] == process.attempt and m[0] in to_coordinator} if index == 0 else set()
        over |= {m for m in w.messages if m[1] == index and m[2] == process.joined and m[0] in from_coordinator}
        w = self.swap(w, process, after)._replace(messages=w.messages - over)  # its connections are closed
        return self.hang_up(w, process)

    def hang_up(self, w: World, process: Process) -> World:
        """The stream that this process is at one end of breaks."""
        link = w.links[process.index]
        cut = link is not None and process.attempt in (link.sender, link.receiver)
        return w._replace(links=put(w.links, process.index, None)) if cut else w

    # ---- faults ----

    def disturbances(self, w: World) -> Iterator[World]:
        for index, process in enumerate(self.holders(w)):
            if process is not None and w.faults[CRASHES]:
                yield self.lose(self.spend(self.remove(w, process), CRASHES), index)
            if process is not None and w.faults[SUSPICIONS]:
                yield self.lose(self.spend(w, SUSPICIONS), index)
            standby = self.find(w, index, w.plan.standbys[index])
            if standby is not None and w.faults[STANDBY_CRASHES]:
                yield self.lose_standby(self.spend(self.remove(w, standby), STANDBY_CRASHES), index)
            if w.links[index] is not None and w.faults[CUTS]:
                yield self.spend(w, CUTS)._replace(links=put(w.links, index, None))
        if w.faults[PLANS]:
            yield self.spend(w, PLANS)._replace(plan=w.plan._replace(generation=w.plan.generation + 1))

    def spend(self, w: World, fault: int) -> World:
        return w._replace(faults=put(w.faults, fault, w.faults[fault] - 1))

    def remove(self, w: World, process: Process) -> World:
        w = self.hang_up(w, process)
        return w._replace(processes=w.processes - {process})

    def new(self, w: World, index: int) -> tuple[World, int]:
        attempt = w.newest[index] + 1
        processes = w.processes | {Process(index, attempt)}
        return w._replace(newest=put(w.newest, index, attempt), processes=processes), attempt

    def lose(self, w: World, index: int) -> World:
        """The master plans without the partition: its standby takes over if it is believed in sync, or all go back."""
        generation = w.plan.generation + 1
        plan = w.plan._replace(generation=generation)
        if w.believed[index]:
            holder = plan.standbys[index]
            w, standby = self.new(w, index) if len(w.believed) == 1 else (w, 0)
            believed = put(w.believed, index, False)
        else:
            w, holder = self.new(w, index)
            standby, believed = plan.standbys[index], (False,) * len(w.believed)
            plan = plan._replace(restored=generation)
            w = w._replace(decided=0)
        plan = plan._replace(holders=put(plan.holders, index, holder), standbys=put(plan.standbys, index, standby))
        return w._replace(plan=plan, believed=believed)

    def lose_standby(self, w: World, index: int) -> World:
        w, standby = self.new(w, index)
        plan = w.plan._replace(generation=w.plan.generation + 1, standbys=put(w.plan.standbys, index, standby))
        return w._replace(plan=plan, believed=put(w.believed, index, False))

    def check(self, w: World) -> None:
        """What must hold in every state."""
        held = [p for p in self.holders(w) if p is not None and p.plan.restored == w.plan.restored]
        steps = [p.step for p in held if not p.stands_by]
        assert not steps or max(steps) - min(steps) <= 1, f"two steps apart: {w}"
        for process in held:
            assert process.acked_version >= w.decided, f"a committed step is lost: {w}"
        for index, believed in enumerate(w.believed):
            standby = self.find(w, index, w.plan.standbys[index])
            if believed and standby is not None:
                assert standby.acked_version >= w.decided, f"a standby could not make a committed step: {w}"


# who has a standby; steps; (crashes, false deaths, crashes of standbys, cuts, new generations)
CASES = [
    ((True,), 2, (1, 1, 0, 0, 0)),
    ((True,), 2, (0, 1, 1, 0, 0)),
    ((True,), 2, (1, 0, 0, 1, 1)),
    ((True,), 2, (0, 1, 0, 1, 0)),
    ((True, False), 1, (1, 0, 0, 0, 0)),
    ((False, True), 1, (1, 0, 0, 0, 0)),
    pytest.param((True, False), 2, (0, 1, 0, 0, 0), marks=pytest.mark.slow),
    pytest.param((False, True), 2, (0, 1, 0, 0, 0), marks=pytest.mark.slow),
    pytest.param((True, True), 1, (1, 0, 0, 0, 0), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("with_standby", "steps", "faults"), CASES)
def test_no_committed_step_is_lost_and_a_job_never_sticks(
    with_standby: tuple[bool, ...], steps: int, faults: tuple[int, int, int, int, int]
) -> None:
    visited = explore(beginning(with_standby, faults), ReplicaModel(steps))
    assert visited > 100, "the model went nowhere"


@pytest.mark.parametrize(
    ("where", "name", "mistake", "case"),
    [
        (in_sync, "may_vote", lambda _in_sync_state, _step: True, CASES[0]),
        (in_sync, "acknowledge", reports_at_once, CASES[0]),
        (in_sync, "acknowledge", never_requires_acks, CASES[0]),
        (in_sync, "adopt", keeps_former_acks, CASES[1]),
        (in_sync, "begin", lambda _in_sync_state: None, ((True,), 2, (0, 0, 0, 1, 0))),
        (voting, "coordinator_learns", lambda coordinator, _decision: (coordinator, None), CASES[4]),
        (voting, "receive_vote", forgets_decisions, CASES[4]),
    ],
    ids=[
        "votes early",
        "tells early",
        "never bound",
        "never untied",
        "never begins again",
        "learns not",
        "repeats not",
    ],
)
def test_the_model_finds_what_is_wrong(
    where: object, name: str, mistake: object, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check can fail: each of these mistakes loses a step, or sticks."""
    monkeypatch.setattr(where, name, mistake)
    with_standby, steps, faults = case
    with pytest.raises(AssertionError, match=r"stuck|apart|is lost|could not make|is gone|holds nothing"):
        explore(beginning(with_standby, faults), ReplicaModel(steps))
