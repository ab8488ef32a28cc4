"""What a step's votes decide, what comes next at a version, and the learning rate."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from harness.played import played_spec
from pscluster.errors import FrameError
from pscluster.job.optimizer import ScheduleSection
from pscluster.job.schedule import learning_rate
from pscluster.step.tree import Summary
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.frame import FrameKind, Header
from psserver.partition.coordinator.coordinator import decide, evaluates_at, next_activity, snapshots_at
from psserver.partition.step.voting import (
    CommitDecision,
    CoordinatorState,
    Member,
    Vote,
    clip_coefficient,
    coordinator_adopts,
    global_norm,
    member_adopts,
    receive_decision,
    receive_vote,
)

FINITE = st.floats(0, 1e30)
FLOATS = st.floats(allow_nan=False)
NAMES = st.sampled_from(["constant", "cosine"])


def vote(partition: int, *, step: int = 0, generation: int = 1, finite: bool = True, **squares: float) -> Vote:
    found = {int(block[1:]): square for block, square in squares.items()}
    return Vote(generation=generation, step=step, partition=partition, squares=found, finite=finite)


def decision(step: int = 0, generation: int = 1) -> CommitDecision:
    return CommitDecision(generation=generation, step=step, kind="commit")


def summary(weight: float = 1.0, loss: float = 1.0) -> Summary:
    return Summary(loss_sum=loss, weight=weight, samples=1, touched=b"")


# ---- votes and decisions ----


def test_the_last_vote_decides_and_the_decision_is_for_all() -> None:
    coordinator = CoordinatorState(num_partitions=2, generation=1, step=0)
    coordinator, answer, _ = receive_vote(coordinator, vote(1), lambda _: decision())
    assert answer is None
    coordinator, answer, _ = receive_vote(coordinator, vote(1), lambda _: decision())
    assert answer is None, "one partition twice is not two"

    coordinator, answer, to_all = receive_vote(
        coordinator, vote(0), lambda votes: decision() if set(votes) == {0, 1} else decision(9)
    )

    assert (answer, to_all) == (decision(), True)
    assert (coordinator.step, dict(coordinator.votes), coordinator.last) == (1, {}, decision())


def test_a_vote_on_the_step_just_decided_is_answered_with_the_same_decision() -> None:
    coordinator = CoordinatorState(
        num_partitions=1, generation=3, step=5, last=CommitDecision(generation=1, step=4, kind="skip", norm=2.5)
    )

    after, answer, to_all = receive_vote(coordinator, vote(1, step=4, generation=3), pytest.fail)

    assert (after, to_all) == (coordinator, False)
    assert answer == CommitDecision(generation=3, step=4, kind="skip", norm=2.5), (
        "of the generation in which it is told"
    )


@pytest.mark.parametrize("stray", [vote(0, generation=2), vote(0, generation=0), vote(0, step=1), vote(0, step=7)])
def test_stray_votes_change_nothing(stray: Vote) -> None:
    coordinator = CoordinatorState(num_partitions=1, generation=1, step=3)

    assert receive_vote(coordinator, stray, pytest.fail) == (coordinator, None, False)


def test_a_new_generation_collects_votes_anew_but_keeps_the_last_decision() -> None:
    coordinator = CoordinatorState(num_partitions=2, generation=1, step=1, votes={0: vote(0)}, last=decision())

    assert coordinator_adopts(coordinator, 4) == CoordinatorState(
        num_partitions=2, generation=4, step=1, votes={}, last=decision()
    )


def test_a_vote_is_cast_again_under_a_new_generation() -> None:
    member = replace(Member(generation=1, step=0), vote=vote(0, b1=2.0))

    assert member_adopts(member, 2).vote == vote(0, generation=2, b1=2.0)
    assert member_adopts(Member(generation=1, step=0), 2).vote is None


@pytest.mark.parametrize(
    ("member", "answer"),
    [
        (Member(generation=1, step=0), decision()),
        (Member(generation=2, step=0, vote=vote(0)), decision()),
        (Member(generation=1, step=1, vote=vote(0, step=1)), decision()),
    ],
    ids=["not voted", "other generation", "other step"],
)
def test_a_decision_that_does_not_fit_is_not_carried_out(member: Member, answer: CommitDecision) -> None:
    assert receive_decision(member, answer) == (member, False)


def test_a_decision_is_carried_out_once() -> None:
    member, now = receive_decision(Member(generation=1, step=0, vote=vote(0)), decision())

    assert (member, now) == (Member(generation=1, step=1, last_decision=decision()), True)
    assert receive_decision(member, decision()) == (member, False)


@given(squares=st.dictionaries(st.integers(0, 40), FINITE, min_size=1), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_the_norm_is_the_same_for_any_number_of_partitions(squares: dict[int, float], cuts: list[int]) -> None:
    whole = {0: Vote(generation=1, step=0, partition=0, squares=squares)}
    split = {
        p: Vote(generation=1, step=0, partition=p, squares={b: s for b, s in squares.items() if low <= b < high})
        for p, (low, high) in enumerate(itertools.pairwise(sorted([0, *cuts, 41])))
    }
    turned = dict(reversed(split.items()))

    assert global_norm(whole, 3.0) == global_norm(split, 3.0) == global_norm(turned, 3.0)


def test_the_norm_is_of_the_mean_gradient() -> None:
    votes = {0: vote(0, b1=9.0), 1: vote(1, b0=16.0)}

    assert global_norm(votes, 2.0) == 2.5
    assert global_norm(votes, 0.0) == 0.0


@pytest.mark.parametrize("clip", [0.5, 1.0, 100.0])
def test_clipping_is_torchs(clip: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    parameter.grad = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    norm = float(torch.nn.utils.clip_grad_norm_([parameter], clip))

    mine = clip_coefficient(math.sqrt(30.0), clip) * torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)

    assert norm == pytest.approx(math.sqrt(30.0))
    torch.testing.assert_close(mine, parameter.grad, rtol=1e-14, atol=0)
    assert clip_coefficient(7.0, None) == 1.0


def test_a_decision_scales_to_the_clipped_mean() -> None:
    spec = played_spec(4, train={"clip_norm": 1.0})

    answer = decide(
        {0: vote(0, step=6, b0=400.0)}, summary(weight=4.0), spec, Plan(final_step=100, generation=2, stop=False)
    )

    assert (answer.step, answer.generation, answer.kind, answer.norm) == (6, 2, "commit", 5.0)
    assert answer.scale == (1.0 / (5.0 + 1e-6)) / 4.0
    assert not answer.snapshot and not answer.last


@pytest.mark.parametrize(
    ("votes", "of"),
    [([vote(0), vote(1, finite=False)], summary()), ([vote(0), vote(1)], summary(loss=math.nan))],
    ids=["a gradient", "the loss"],
)
def test_what_is_not_finite_anywhere_is_skipped_or_stopped_everywhere(votes: list[Vote], of: Summary) -> None:
    by_partition = {v.partition: v for v in votes}
    for choice in ("stop", "skip"):
        spec = played_spec(4, on_nonfinite=choice, durability={"every_steps": 1})
        answer = decide(by_partition, of, spec, Plan(final_step=100, generation=1, stop=False))
        assert answer.kind == choice
        assert math.isnan(answer.norm)
        assert answer.snapshot == (choice == "skip"), "a step that stops the job makes no version"


def test_a_step_without_weight_moves_nothing_by_its_gradient() -> None:
    answer = decide({0: vote(0)}, summary(weight=0.0), played_spec(4), Plan(final_step=100, generation=1, stop=False))

    assert (answer.kind, answer.scale, answer.norm) == ("commit", 0.0, 0.0)


def test_a_stop_is_written() -> None:
    answer = decide({0: vote(0)}, summary(), played_spec(4), Plan(final_step=100, generation=1, stop=True))

    assert answer.snapshot and answer.last


# ---- messages ----


@given(st.dictionaries(st.integers(0, 2**32 - 1), st.floats(allow_nan=False), max_size=9), st.booleans())
def test_a_vote_reads_back(squares: dict[int, float], finite: bool) -> None:
    cast = Vote(generation=3, step=8, partition=2, squares=squares, finite=finite)
    body = cast.pack()

    assert Vote.unpack(Header(kind=FrameKind.VOTE, job=1, generation=3, step=8, sender=2), memoryview(body)) == cast
    assert len(body) == Vote.max_bytes(len(squares))


@given(
    st.floats(allow_nan=False), st.floats(allow_nan=False), st.booleans(), st.sampled_from(["commit", "skip", "stop"])
)
def test_a_decision_reads_back_to_the_bit(scale: float, norm: float, flag: bool, kind: Any) -> None:
    answer = CommitDecision(generation=1, step=2, kind=kind, scale=scale, norm=norm, snapshot=flag, last=not flag)

    assert CommitDecision.unpack(memoryview(answer.pack())) == answer


def test_a_decision_without_a_norm_reads_back() -> None:
    answer = CommitDecision.unpack(CommitDecision(generation=1, step=2, kind="skip", norm=math.nan).pack())

    assert math.isnan(answer.norm)


@pytest.mark.parametrize("body", [b"", b"\1\2", bytes(12)])
def test_a_vote_of_no_fitting_length_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError, match="a vote"):
        Vote.unpack(Header(kind=FrameKind.VOTE, job=1), memoryview(body))


@pytest.mark.parametrize("body", [b"", b"[]", b'{"kind": 1}', b'{"generation": 1, "step": 1, "kind": "skip", "x": 1}'])
def test_what_is_no_decision_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError, match="CommitDecision"):
        CommitDecision.unpack(memoryview(body))


# ---- what comes next ----


def test_versions_are_evaluated_and_written_as_the_spec_says() -> None:
    spec = played_spec(4, evaluate={"every_steps": 4}, durability={"every_steps": 3})
    versions = range(11)

    assert [v for v in versions if evaluates_at(v, spec, 10)] == [4, 8, 10]
    assert [v for v in versions if snapshots_at(v, spec, 10)] == [0, 3, 4, 6, 8, 9, 10]
    assert [v for v in versions if evaluates_at(v, played_spec(4), 10)] == [10]


def test_a_job_trains_evaluates_and_finishes() -> None:
    """Played from the first version to the end, with a stop or without."""
    spec = played_spec(4, evaluate={"every_steps": 2}, durability={"every_steps": 4})

    def play(stop_after: int | None) -> list[str]:
        version, evaluated, saved, log = 0, -1, 0, ""
        for turn in itertools.count():
            stop = stop_after is not None and turn >= stop_after
            action = next_activity(version, spec, 5, evaluated=evaluated, saved=saved, stop=stop)
            log += f"{action[0]}{version} "
            if action == "finish":
                return log.split()
            if action == "evaluate":
                evaluated = version
            else:
                version += 1
                saved = version if stop or snapshots_at(version, spec, 5) else saved
        raise AssertionError

    assert play(None) == ["t0", "t1", "e2", "t2", "t3", "e4", "t4", "e5", "f5"]
    assert play(0) == ["f0"], "version 0 is made again from the seed: it counts as written"
    assert play(1) == ["t0", "t1", "f2"]
    assert play(3) == ["t0", "t1", "e2", "f2"], "it is written already"
    assert play(2) == ["t0", "t1", "f2"], "a stop does not wait for an evaluation"
    assert play(7) == ["t0", "t1", "e2", "t2", "t3", "e4", "t4", "e5", "f5"], "the last version is finished as such"


def test_a_rest_comes_at_the_next_written_version_and_before_its_evaluation() -> None:
    spec = played_spec(2, 2, evaluate={"every_steps": 2}, durability={"every_steps": 100})

    def action(version: int, saved: int, *, stop: bool = False) -> str:
        return next_activity(version, spec, 5, evaluated=-1, saved=saved, stop=stop, save=True)

    assert action(3, 2) == "train"
    assert action(3, 3) == "hold"
    assert action(2, 2) == "hold"
    assert action(3, 3, stop=True) == "finish", "a stop goes first"
    assert action(5, 5) == "evaluate", "the last version is finished as such"
    decided = decide({0: vote(0)}, summary(), spec, Plan(final_step=5, generation=1, stop=False, save=True))
    assert decided.snapshot and not decided.last


# ---- the learning rate ----

CONSTANT = ScheduleSection(warmup_steps=5)


def rates(schedule: ScheduleSection, final_step: int) -> list[float]:
    return [learning_rate(0.3, schedule, step, final_step) for step in range(final_step)]


def torchs(make: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_is_torchs_linear() -> None:
    expected = torchs(lambda o: LinearLR(o, start_factor=1 / 5, end_factor=1.0, total_iters=4), 12)

    assert rates(CONSTANT, 12) == pytest.approx(expected, rel=1e-12)
    assert rates(CONSTANT, 12)[4:] == [0.3] * 8, "reaches the base at update 5"


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_cosine_is_torchs(ratio: float) -> None:
    schedule = ScheduleSection(name="cosine", final_ratio=ratio)
    expected = torchs(lambda o: CosineAnnealingLR(o, T_max=40, eta_min=0.3 * ratio), 40)

    assert rates(schedule, 40) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert learning_rate(0.3, schedule, 40, 40) == pytest.approx(0.3 * ratio)


def test_the_cosine_begins_after_warm_up_at_the_base() -> None:
    found = rates(ScheduleSection(name="cosine", warmup_steps=10), 30)

    assert found[9] == found[10] == 0.3
    assert found == [*sorted(found[:10]), *sorted(found[10:], reverse=True)]
    assert min(found) > 0.0


@given(
    st.sampled_from(["constant", "cosine"]),
    st.integers(0, 50),
    st.floats(0, 1),
    st.integers(0, 100),
    st.integers(1, 60),
)
def test_a_rate_is_never_outside_its_bounds(name: Any, warmup: int, ratio: float, step: int, final: int) -> None:
    schedule = ScheduleSection(name=name, warmup_steps=warmup, final_ratio=ratio)

    assert 0.0 <= learning_rate(0.3, schedule, step, final) <= 0.3
