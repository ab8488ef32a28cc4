"""The audit of a step: digests in every order, repeats, trainers that are replaced, and who is named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from harness.played import played_spec
from pscluster.step.audit import AuditRole, audited_shard
from pscluster.step.layout import Layout, TensorSpec
from pscluster.v1.plan_pb2 import AuditMismatch, Plan, ProcessReport, ShardRange, TrainerPlacement
from pscluster.wire.protocol import LeafDigest
from psserver.partition.actions import RequestDigest
from psserver.partition.coordinator.audits import MAX_WAIT_S, OpenAudit

LAYOUT = Layout(
    tuple(TensorSpec(names=(name,), shape=(4,), dtype="float32", kind="trained") for name in ("first.w", "second.w"))
)
OWNER, AUDITOR, ARBITER = AuditRole
RIGHT = LeafDigest(loss_sum=1.5, weight=2.0, tensors={0: 11, 1: 12})
WRONG = LeafDigest(loss_sum=1.5, weight=2.0, tensors={0: 11, 1: 13})
OTHER = LeafDigest(loss_sum=1.5, weight=2.0, tensors={0: 11, 1: 14})


def audited_plan(num_trainers: int, generation: int = 1, *, gone: int = -1, attempt: int = 1, **fields: Any) -> Plan:
    """One shard for each trainer; `gone` is not active, and its shard is the next one's."""
    trainers = []
    for rank in range(num_trainers):
        shards = [rank, gone] if 0 <= gone == (rank - 1) % num_trainers else [rank]
        runs = [ShardRange(first=shard, count=1) for shard in shards]
        node_id, active = f"worker-{rank}", rank != gone
        trainers.append(TrainerPlacement(rank=rank, attempt=attempt, node_id=node_id, active=active, shards=runs))
    return Plan(generation=generation, trainers=trainers, layout_json=LAYOUT.to_json(), final_step=100, **fields)


class Case:
    """Every step of a job of so many trainers is audited; its step 0 is open."""

    def __init__(self, num_trainers: int, on_mismatch: str | None = None, **fields: Any) -> None:
        self.num_trainers = num_trainers
        self.plan = audited_plan(num_trainers, **fields)
        self.audits = OpenAudit(played_spec(num_trainers, audit={"share": 1.0, "on_mismatch": on_mismatch}))
        self.audits.open_step(0, self.plan)
        shard = audited_shard(0, 0, 1.0, num_trainers)
        assert shard is not None
        self.shard = shard

    def rank(self, role: AuditRole) -> int:
        return (self.shard + role) % self.num_trainers

    def take(self, role: AuditRole, digest: LeafDigest) -> ProcessReport | None:
        self.audits.take(self.shard, role, self.rank(role), digest)
        return self.audits.settle(self.plan)

    def mismatch(self, *digests: LeafDigest) -> AuditMismatch:
        """What is reported after digests of owner, auditor and arbiter that differ."""
        reports = [self.take(role, digest) for role, digest in zip(AuditRole, digests, strict=False)]
        assert [report for report in reports[:-1] if report is not None] == []
        assert reports[-1] is not None and self.results() == ["differing"]
        return reports[-1].audit_mismatch

    def results(self) -> list[str]:
        return [record.result for record in self.audits.records]


def details(report: AuditMismatch) -> dict[str, str]:
    return dict(report.error.details)


@pytest.mark.parametrize("order", list(itertools.permutations([OWNER, AUDITOR])))
def test_equal_digests_end_an_audit_in_any_order_and_repeated(order: tuple[AuditRole, ...]) -> None:
    case = Case(3)
    assert case.audits.holds_step
    for role in (order[0], order[0], *order, *order):
        assert case.take(role, RIGHT) is None
    assert not case.audits.holds_step and case.results() == ["equal"]
    (record,) = case.audits.take_records()
    assert (record.step, list(record.nodes)) == (1, [f"worker-{case.rank(role)}" for role in (OWNER, AUDITOR)])
    assert case.audits.records == []


@pytest.mark.parametrize(("wrong", "named"), [(OWNER, OWNER), (AUDITOR, AUDITOR), (ARBITER, None)])
@pytest.mark.parametrize("order", list(itertools.permutations(AuditRole)))
def test_two_against_one_name_the_sick_node_in_any_order(
    order: tuple[AuditRole, ...], wrong: AuditRole, named: AuditRole | None
) -> None:
    case = Case(3, "exclude")
    reports = [case.take(role, WRONG if role is wrong else RIGHT) for role in order]
    found = [report.audit_mismatch for report in reports if report is not None]
    if named is None:
        assert found == [] and case.results() == ["equal"], "the third is not asked, and so does not count"
        return
    (report,) = found
    assert report.node_id == f"worker-{case.rank(named)}" == details(report)["nodes"]
    assert (report.step, details(report)["step"], details(report)["shard"]) == (1, "1", str(case.shard))
    assert (details(report)["kind"], details(report)["tensor"]) == ("node", "second.w")
    assert case.audits.holds_step and case.results() == ["differing"]


def test_the_third_is_asked_as_soon_as_two_differ_and_until_it_answers() -> None:
    case = Case(3)
    case.take(AUDITOR, WRONG)
    assert case.audits.requests() == []
    case.take(OWNER, RIGHT)
    wanted = [RequestDigest(case.rank(ARBITER), 0, case.shard)]
    assert case.audits.requests() == wanted == case.audits.requests()
    assert case.results() == [] and case.audits.holds_step
    assert case.take(ARBITER, RIGHT) is not None
    assert case.audits.requests() == []


def test_three_different_results_are_the_codes_fault() -> None:
    report = Case(3, "exclude").mismatch(RIGHT, WRONG, OTHER)
    assert (details(report)["kind"], report.node_id) == ("code", ""), "no node is left out for that"
    assert details(report)["nodes"].count("worker-") == 3


def test_of_two_both_are_named() -> None:
    report = Case(2, "exclude").mismatch(RIGHT, WRONG)
    assert (details(report)["kind"], report.node_id) == ("either", "")
    assert sorted(details(report)["nodes"].split(", ")) == ["worker-0", "worker-1"]


def test_one_alone_that_differs_from_itself_is_named() -> None:
    report = Case(1, "stop").mismatch(RIGHT, WRONG)
    assert (details(report)["kind"], details(report)["nodes"], report.node_id) == ("alone", "worker-0", "")


@pytest.mark.parametrize(
    ("wanted", "mixed", "warns"),
    [(None, False, False), (None, True, True), ("warn", False, True), ("stop", True, False)],
)
def test_a_warning_lets_the_step_go_on(wanted: str | None, mixed: bool, warns: bool) -> None:
    case = Case(2, wanted, mixed=mixed)
    case.take(OWNER, RIGHT)
    report = case.take(AUDITOR, WRONG)
    assert report is not None
    assert report.WhichOneof("body") == ("warning" if warns else "audit_mismatch")
    assert case.audits.holds_step is not warns and case.audits.is_rejected is not warns


@pytest.mark.parametrize(
    ("digest", "first"),
    [
        (LeafDigest(loss_sum=1.5, weight=3.0, tensors={0: 11, 1: 12}), "weight"),
        (LeafDigest(loss_sum=-1.5, weight=2.0, tensors={0: 11, 1: 12}), "loss"),
        (LeafDigest(loss_sum=1.5, weight=2.0, tensors={0: 11}), 1),
        (LeafDigest(loss_sum=9.0, weight=9.0, tensors={0: 1, 1: 1}), 0),
    ],
)
def test_the_first_difference_is_named(digest: LeafDigest, first: int | str) -> None:
    assert RIGHT.first_difference(digest) == digest.first_difference(RIGHT) == first
    assert RIGHT.first_difference(RIGHT) is None
    nan = LeafDigest(loss_sum=float("nan"), weight=1.0, tensors={})
    assert nan.first_difference(LeafDigest.unpack(nan.pack())) is None


# ---- what is lost ----


def roles(case: Case) -> list[int]:
    assert case.audits.pending is not None
    return [-1 if one is None else one.rank for one in case.audits.pending.roles]


@pytest.mark.parametrize("answers", [[], [OWNER], [AUDITOR]])
def test_an_audit_lost_with_its_auditor_is_made_by_the_next(answers: list[AuditRole]) -> None:
    case = Case(3)
    for role in answers:
        case.take(role, RIGHT)
    case.plan = audited_plan(3, 2, gone=case.rank(AUDITOR))
    case.audits.adopt(case.plan)
    assert case.audits.holds_step and roles(case) == [case.rank(OWNER), case.rank(ARBITER), -1]
    case.take(AUDITOR, WRONG)  # what the lost one sent counts for nothing
    if OWNER not in answers:
        case.take(OWNER, RIGHT)
    assert case.results() == []
    case.audits.take(case.shard, AUDITOR, case.rank(ARBITER), RIGHT)
    assert case.audits.settle(case.plan) is None and case.results() == ["equal"]


@pytest.mark.parametrize("answers", [[], [AUDITOR]])
def test_an_owner_that_is_lost_before_its_digest_is_replaced(answers: list[AuditRole]) -> None:
    """Its auditor has the shard now, and another one computes it a second time."""
    case = Case(3)
    for role in answers:
        case.take(role, RIGHT)
    case.plan = audited_plan(3, 2, gone=case.rank(OWNER))
    case.audits.adopt(case.plan)
    assert roles(case) == [case.rank(AUDITOR), case.rank(ARBITER), -1]
    for role, rank in ((OWNER, case.rank(AUDITOR)), (AUDITOR, case.rank(ARBITER))):
        assert case.results() == []
        case.audits.take(case.shard, role, rank, RIGHT)
        assert case.audits.settle(case.plan) is None
    assert case.results() == ["equal"]


def test_the_digest_of_an_owner_that_is_lost_counts_on_for_its_gradient_may_be_in_the_sum() -> None:
    case = Case(3, "exclude")
    case.take(OWNER, WRONG)
    case.plan = audited_plan(3, 2, gone=case.rank(OWNER))
    case.audits.adopt(case.plan)
    assert roles(case) == [case.rank(OWNER), case.rank(ARBITER), case.rank(AUDITOR)]
    case.take(OWNER, RIGHT)
    case.audits.take(case.shard, OWNER, case.rank(AUDITOR), RIGHT)
    case.audits.take(case.shard, AUDITOR, case.rank(ARBITER), RIGHT)
    assert case.audits.settle(case.plan) is None
    assert case.audits.requests() == [RequestDigest(case.rank(AUDITOR), 0, case.shard)]
    case.audits.take(case.shard, ARBITER, case.rank(AUDITOR), RIGHT)
    report = case.audits.settle(case.plan)
    assert report is not None
    assert details(report.audit_mismatch)["trainers"] == f"trainer-{case.rank(OWNER)} on worker-{case.rank(OWNER)}"


def test_a_trainer_that_is_left_alone_keeps_the_digest_that_it_has_sent() -> None:
    case = Case(2)
    case.take(AUDITOR, RIGHT)
    case.plan = audited_plan(2, 2, gone=case.rank(OWNER))
    case.audits.adopt(case.plan)
    assert roles(case) == [case.rank(AUDITOR), case.rank(AUDITOR), -1]
    case.audits.take(case.shard, OWNER, case.rank(AUDITOR), RIGHT)
    assert case.audits.settle(case.plan) is None and case.results() == ["equal"]


@pytest.mark.parametrize("generation", [3, 4])
def test_a_role_that_comes_back_finds_what_was_sent_before(generation: int) -> None:
    """The owner computes nothing twice; only after a plan that was skipped another gradient may be in the sums."""
    case = Case(3)
    assert case.take(OWNER, RIGHT) is None
    swapped = audited_plan(3, 2)
    owner, auditor = case.rank(OWNER), case.rank(AUDITOR)
    runs = {rank: list(swapped.trainers[rank].shards) for rank in (owner, auditor)}
    for rank, other in ((owner, auditor), (auditor, owner)):
        del swapped.trainers[rank].shards[:]
        swapped.trainers[rank].shards.extend(runs[other])
    swapped.trainers[case.rank(ARBITER)].active = False
    case.audits.adopt(swapped)
    case.audits.adopt(audited_plan(3, generation))
    assert case.take(AUDITOR, RIGHT) is None
    assert case.audits.holds_step == (generation == 4)
    assert [record.result for record in case.audits.take_records()] == ["equal"] * (generation == 3)


def test_a_process_that_was_replaced_is_another_one() -> None:
    case = Case(3)
    case.take(AUDITOR, RIGHT)
    case.audits.adopt(audited_plan(3, 2, attempt=2))
    assert case.take(OWNER, RIGHT) is None and case.results() == [], "its digest is that of the process before"
    case.take(AUDITOR, RIGHT)
    assert case.results() == ["equal"]


def test_without_any_trainer_the_step_waits_for_the_next() -> None:
    case = Case(2)
    case.take(OWNER, RIGHT)
    case.audits.adopt(Plan(generation=2, final_step=100))
    assert case.audits.holds_step
    case.audits.adopt(audited_plan(2, 3))
    case.take(AUDITOR, RIGHT)
    assert case.results() == ["equal"]

    case.audits.open_step(1, Plan(generation=4, final_step=100))
    assert case.audits.holds_step and case.audits.pending is None
    case.audits.adopt(audited_plan(2, 5))
    assert case.audits.pending is not None and case.audits.pending.step == 1


def test_an_audit_survives_a_plan_that_does_not_concern_it() -> None:
    case = Case(3)
    case.take(OWNER, RIGHT)
    case.audits.adopt(audited_plan(3, 2, gone=case.rank(ARBITER)))
    assert case.take(AUDITOR, RIGHT) is None
    assert case.results() == ["equal"]


def test_after_a_plan_that_was_skipped_the_digest_of_a_former_owner_counts_no_more() -> None:
    case = Case(3)
    case.take(OWNER, WRONG)
    case.audits.adopt(audited_plan(3, 3, gone=case.rank(OWNER)))
    assert roles(case) == [case.rank(AUDITOR), case.rank(ARBITER), -1]


def test_an_arbiter_that_is_lost_is_not_waited_for() -> None:
    case = Case(3)
    case.take(OWNER, RIGHT)
    assert case.take(AUDITOR, WRONG) is None
    case.plan = audited_plan(3, 2, gone=case.rank(ARBITER))
    case.audits.adopt(case.plan)
    report = case.audits.settle(case.plan)
    assert report is not None and details(report.audit_mismatch)["kind"] == "either"


def test_waits_are_bounded() -> None:
    case = Case(3)
    case.audits.expire(0.0, waits=False)
    case.audits.expire(1000.0, waits=True)
    case.audits.expire(1000.0 + MAX_WAIT_S - 1, waits=True)
    assert case.audits.holds_step
    case.audits.expire(1000.0 + MAX_WAIT_S, waits=True)
    assert not case.audits.holds_step and case.results() == ["unfinished"]

    case = Case(3)
    case.take(OWNER, RIGHT)
    case.take(AUDITOR, WRONG)
    for now_s in (0.0, MAX_WAIT_S):
        case.audits.expire(now_s, waits=True)
    report = case.audits.settle(case.plan)
    assert report is not None and details(report.audit_mismatch)["kind"] == "either"

    case = Case(3)
    case.audits.open_step(1, Plan(generation=1, final_step=100))
    for now_s in (0.0, MAX_WAIT_S):
        case.audits.expire(now_s, waits=True)
    assert not case.audits.holds_step and case.results() == ["unfinished", "unfinished"]


def test_a_digest_of_another_trainer_or_shard_counts_for_nothing() -> None:
    case = Case(3)
    case.audits.take(case.shard, OWNER, case.rank(AUDITOR), WRONG)
    case.audits.take((case.shard + 1) % 3, OWNER, case.rank(OWNER), WRONG)
    case.take(OWNER, RIGHT)
    case.take(AUDITOR, RIGHT)
    assert case.results() == ["equal"]


def test_a_step_that_was_decided_elsewhere_leaves_its_audit_unfinished() -> None:
    case = Case(3)
    case.audits.open_step(1, case.plan)
    assert case.results() == ["unfinished"] and case.audits.pending is not None
    case.audits.open_step(100, case.plan)
    assert case.audits.pending is None, "there is no step after the last one"


def test_nothing_is_audited_by_default() -> None:
    audits = OpenAudit(played_spec(3))
    for step in range(50):
        audits.open_step(step, audited_plan(3))
        assert not audits.holds_step
