"""Real partitions with real standbys on a network that breaks: whoever is lost, no committed step is, and the values at
the end are those of one partition that nobody disturbed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.offered_job import FINAL_STEP, Events, OfferedJob, events_of, play, same, seeded
from harness.played import PlayedConnection
from harness.wrong_decisions import keeps_former_acks, never_requires_acks, reports_at_once
from pscluster.step.layout import BLOCK_WORDS, WORD_BYTES
from pscluster.wire.frame import Header
from psserver.partition.replication import in_sync
from psserver.partition.replication.primary import PATIENCE_S, Replication
from psserver.partition.step import voting
from psserver.partition.step.voting import CommitDecision


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[torch.Tensor]]:
    return {codec: OfferedJob(1, codec, standbys=False).run_to_the_end() for codec in ("fp32", "bf16")}


@pytest.fixture
def job() -> Iterator[OfferedJob]:
    job = OfferedJob(2)
    yield job
    job.close()


def synced(job: OfferedJob, steps: int = 1) -> OfferedJob:
    """Run until every standby is in sync and some steps are made."""
    job.make_steps(steps)
    assert job.master.synced == [True] * job.count
    return job


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_standby_holds_the_very_bits(count: int, codec: str, undisturbed: dict[str, list[torch.Tensor]]) -> None:
    job = OfferedJob(count, codec)
    assert same(job.run_to_the_end(), undisturbed[codec])
    for index in range(count):
        partition, standby = job.partition(index).state, job.standby(index)
        assert standby is not None and standby.state is not None and partition is not None
        assert standby.version == FINAL_STEP
        assert partition.update_counts == standby.state.update_counts
        assert partition.places().keys() == standby.state.places().keys()
        for key, memory in partition.places().items():
            assert bytes(memory) == bytes(standby.state.places()[key]), key
    job.close()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("moment", ["before the sums", "after its vote", "after the decision"])
def test_a_standby_takes_over_and_nobody_goes_back(
    job: OfferedJob, index: int, moment: str, undisturbed: dict[str, list[torch.Tensor]]
) -> None:
    synced(job, 2)
    done = job.partition(0).version
    if moment != "before the sums":
        job.push(index)
        job.network.settle()
        assert job.partition(index).member.vote is not None
    if moment == "after the decision":
        job.push(1 - index)
        for _ in range(1000):
            if job.partition(index).member.step == done + 1:
                break
            job.network.choices()[0]()
        assert job.partition(index).member.step == done + 1
    job.lose_partition(index)
    assert job.master.restores == 1
    values = job.run_to_the_end()
    assert same(values, undisturbed["fp32"])
    assert job.master.restores == 1
    if index == 0:
        coordinator: Any = job.partition(0)
        coordinator.carry_out(coordinator.coordinator.report_progress(1e9, force=True))
        records = [record.step for report in coordinator.link.reported("progress") for record in report.records]
        assert records == list(range(1, FINAL_STEP + 1)), "what the coordinator before it had not reported is reported"


def _decided_behind_its_standby(job: OfferedJob) -> CommitDecision:
    """The coordinator decided and told the other partition, but its standby has not heard; the decision."""
    synced(job, 2)
    done = job.partition(0).version
    standby, member = job.standby(0), job.partition(1)
    assert standby is not None
    for index in (0, 1):
        job.push(index)
    for _ in range(1000):
        if member.member.step == done + 1:
            break
        received = standby.member.vote is not None  # it has the step: what follows would be the decision
        waiting = [c for c in job.network.connections if c.inbox and not (received and c.handler is standby.handler)]
        waiting[0].deliver() if waiting else job.network.posted.popleft()()
    assert (member.member.step, standby.member.step) == (done + 1, done)
    assert member.member.last_decision is not None
    return member.member.last_decision


def test_the_coordinator_takes_what_a_member_was_told_before_it(
    job: OfferedJob, undisturbed: dict[str, list[torch.Tensor]]
) -> None:
    said = _decided_behind_its_standby(job)
    job.lose_partition(0)
    job.everybody_adopts()
    job.settle()
    last = job.partition(0).member.last_decision
    assert last is not None and (last.step, last.norm) == (said.step, said.norm)
    assert same(job.run_to_the_end(), undisturbed["fp32"])
    assert job.master.restores == 1


def test_votes_wait_for_the_standby_and_go_on_without_it(job: OfferedJob) -> None:
    synced(job)
    version = job.partition(1).version
    standby = job.standby(1)
    assert standby is not None
    held = [c for c in job.network.connections if c.handler is standby.handler]
    assert len(held) == 1
    held[0].reading = False  # it stops
    job.push(0)
    job.push(1)
    job.network.settle()
    assert job.partition(1).member.vote is None
    assert [p.version for p in (job.partition(0), job.partition(1))] == [version] * 2
    job.lose_standby(1)
    job.everybody_adopts()
    job.settle()
    assert [p.version for p in (job.partition(0), job.partition(1))] == [version + 1] * 2


def test_a_standby_that_does_not_answer_is_reported(job: OfferedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    synced(job)
    standby = job.standby(1)
    assert standby is not None
    next(c for c in job.network.connections if c.handler is standby.handler).reading = False
    job.push(1)
    job.network.settle()
    now_s = time.monotonic()
    monkeypatch.setattr("psserver.partition.replication.primary.time.monotonic", lambda: now_s)
    link: Any = job.partition(1).link
    for passed_s in (0.0, PATIENCE_S - 0.1, 0.2):
        assert link.reported("standby_state") == []
        now_s += passed_s
        job.network.fire_timers()
    assert [s.in_sync for s in link.reported("standby_state")] == [False]
    job.hear_reports()
    assert job.master.standbys[1] == 0


def test_a_standby_that_comes_late_gets_a_state_and_then_the_steps(undisturbed: dict[str, list[torch.Tensor]]) -> None:
    job = OfferedJob(2, standbys=False)
    for _ in range(2):
        job.everybody_adopts()
        job.settle()
        job.push(0)
        job.push(1)
        job.settle()
    assert job.partition(0).version == 2
    job.push(1)  # the open step has sums already
    job.place_standby(1)
    job.publish()
    job.everybody_adopts()
    job.settle()
    assert job.master.synced == [False, True]
    job.lose_partition(1)
    assert same(job.run_to_the_end(), undisturbed["fp32"])
    assert job.master.restores == 1
    job.close()


def test_without_a_standby_in_sync_all_go_back(job: OfferedJob, undisturbed: dict[str, list[torch.Tensor]]) -> None:
    synced(job, 2)
    job.lose_standby(1)
    job.lose_partition(1)
    assert job.master.restores == 2
    assert same(job.run_to_the_end(), undisturbed["fp32"])


@pytest.mark.parametrize("index", [0, 1])
def test_the_one_before_wakes_up_and_changes_nothing(
    job: OfferedJob, index: int, undisturbed: dict[str, list[torch.Tensor]]
) -> None:
    """It was stopped in the middle of a step, taken for lost, and goes on under its older generation."""
    synced(job, 2)
    job.push(0)
    job.push(1)
    job.lose_partition(index, lives_on=True)
    (zombie,) = job.zombies
    refused = zombie.counters
    job.everybody_adopts()
    job.settle()
    if zombie.step is not None and not zombie.step.summary.is_complete:
        job._complete(zombie, zombie.member.step)
    job.settle()
    assert same(job.run_to_the_end(), undisturbed["fp32"])
    assert job.master.restores == 1
    assert zombie.version <= job.partition(index).version and refused is zombie.counters
    assert job.partition(index).counters.fenced > 0, "it never knocked: nothing was tested"


EVENTS = events_of("partition lost", "taken for lost", "standby lost", "standby comes", "evaluate", max_size=50)


def storm(count: int, codec: str, events: Events) -> list[torch.Tensor]:
    job = OfferedJob(count, codec)
    try:
        for event in events:
            play(job, *event)
            job.hear_reports()
            job.check()
        return job.run_to_the_end()
    finally:
        job.close()


@settings(max_examples=250, deadline=None)
@given(count=st.integers(1, 3), codec=st.sampled_from(["fp32", "bf16"]), events=EVENTS)
def test_faults_change_nothing_in_the_end(
    count: int, codec: str, events: Events, undisturbed: dict[str, list[torch.Tensor]]
) -> None:
    assert same(storm(count, codec, events), undisturbed[codec])


def test_seeded_storms_change_nothing_and_meet_what_they_are_for(undisturbed: dict[str, list[torch.Tensor]]) -> None:
    takeovers = breaks = 0
    for seed in range(150):
        job = seeded(seed)
        assert same(job.values_at_the_end, undisturbed[job.spec.network.push_codec]), f"seed {seed}"
        takeovers += job.master.takeovers
        breaks += job.network.breaks
    assert takeovers > 30
    assert breaks > 50


def _streams_on(self: Replication) -> None:
    self._streams = True


def _many_storms(count: int) -> None:
    for seed in range(count):
        seeded(seed)


@pytest.mark.parametrize(
    ("where", "name", "mistake"),
    [
        (in_sync, "may_vote", lambda _in_sync_state, _step: True),
        (in_sync, "acknowledge", reports_at_once),
        (in_sync, "acknowledge", never_requires_acks),
        (in_sync, "adopt", keeps_former_acks),
        (Replication, "_send_decision", lambda _self, _decision: None),
        (Replication, "_stream", _streams_on),
        (Replication, "send_metadata", lambda _self: None),
    ],
    ids=[
        "votes without it",
        "tells before it is so",
        "is never bound",
        "is never untied",
        "says no decision",
        "takes for sent what went over another line",
        "tells no evaluation",
    ],
)
def test_the_storm_finds_what_is_wrong(
    where: object, name: str, mistake: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks can fail: with each of these mistakes a step is lost, or the job sticks."""
    monkeypatch.setattr(where, name, mistake)
    with pytest.raises(
        AssertionError, match=r"could not make the committed step|stuck|apart|two decisions|evaluations"
    ):
        _many_storms(500)


def test_a_coordinator_that_does_not_learn_sticks(job: OfferedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voting, "coordinator_learns", lambda coordinator, _decision: (coordinator, None))
    _decided_behind_its_standby(job)
    job.lose_partition(0)
    with pytest.raises(AssertionError, match="stuck"):
        job.run_to_the_end()


def test_a_standby_that_catches_up_slowly_holds_votes_back_rather_than_memory(
    monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, list[torch.Tensor]]
) -> None:
    """Sums that the network does not take pile up only so far."""
    job = OfferedJob(1, standbys=False)
    job.everybody_adopts()
    job.settle()
    unsent: list[Any] = []
    send = PlayedConnection.send

    def slowly(connection: PlayedConnection, header: Header, *body: Any, tag: object = None, **rest: Any) -> None:
        if isinstance(tag, tuple) and tag[0] == "step":
            unsent.append(rest.pop("on_sent"))
        send(connection, header, *body, tag=tag, **rest)

    monkeypatch.setattr(PlayedConnection, "send", slowly)
    monkeypatch.setattr(Replication, "_limit_bytes", lambda _self: 2 * 3 * BLOCK_WORDS * WORD_BYTES)
    job.place_standby(0)
    job.publish()
    job.everybody_adopts()
    job.network.settle()
    partition = job.partition(0)
    next(
        c for c in job.network.connections if c.handler is partition.replication._dialer
    ).reading = False  # no word comes back
    partition.replication.in_sync = replace(partition.replication.in_sync, ack_required=False, reported_in_sync=False)
    for _ in range(FINAL_STEP):
        job.push(0)
        job.network.settle()
    assert partition.version < FINAL_STEP, "nothing held it back"
    held_at = partition.version
    now_s = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr("psserver.partition.replication.primary.time.monotonic", lambda: now_s)
        job.network.fire_timers()
        now_s += PATIENCE_S + 0.1
        job.network.fire_timers()
    link: Any = partition.link
    assert [said.in_sync for said in link.reported("standby_state")][-1:] == [False], "nor for ever"
    while partition.version < FINAL_STEP and unsent:
        unsent.pop(0)()
        job.network.settle()
        job.push(0)
        job.network.settle()
    assert held_at < partition.version == FINAL_STEP
    assert same(job.values([partition]), undisturbed["fp32"])
    job.close()
