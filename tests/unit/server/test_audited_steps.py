"""A step is decided when its audit has ended, and never when its trainers differ."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from harness.played import Network, dismiss, fill, job_header, played_partition, played_plan, played_spec
from harness.played_caller import Caller
from pscluster.step.audit import AuditRole, audited_shard
from pscluster.step.tree import TreeNode
from pscluster.wire.frame import AckResult, FrameKind
from pscluster.wire.protocol import LeafDigest
from psserver.partition.coordinator.audits import MAX_WAIT_S
from psserver.partition.coordinator.coordinator import REPORT_INTERVAL_S
from psserver.partition.step.voting import Vote
from tests.unit.server.test_coordinator import FINAL_STEP, LAYOUT, Played

RIGHT = LeafDigest(loss_sum=1.0, weight=1.0, tensors={0: 1})
WRONG = LeafDigest(loss_sum=1.0, weight=1.0, tensors={0: 2})


class PlayedAudit(Played):
    """Every step is audited. Trainer 0 has both shards, or with `trainers=2` each one."""

    def __init__(self, trainers: int = 1, **audit: Any) -> None:
        self.trainers = trainers
        super().__init__(audit={"share": 1.0, **audit})

    def plan(self, generation: int, **fields: Any) -> Any:
        shards = {0: [0, 1]} if self.trainers == 1 else {0: [0], 1: [1]}
        return played_plan(LAYOUT, shards, generation=generation, partitions=2, final_step=FINAL_STEP, **fields)

    def digest(self, role: AuditRole, digest: LeafDigest = RIGHT) -> None:
        step = self.coordinator.version
        shard = audited_shard(0, step, 1.0, 2)
        assert shard is not None
        rank = 0 if self.trainers == 1 else (shard + role) % 2
        self.carry_out(self.coordinator.audit(step, shard, role, rank, digest))

    def decisions(self) -> list[int]:
        return [said[2].step for said in self.log if said[0] == "decision"]


def test_an_audited_step_is_decided_when_both_digests_are_there() -> None:
    played = PlayedAudit(2).open()
    played.digest(AuditRole.AUDITOR)
    played.vote()
    assert played.decisions() == []
    played.digest(AuditRole.OWNER)
    assert played.decisions() == [0, 0] and played.directives() == ["train 1"]
    played.digest(AuditRole.OWNER)
    played.digest(AuditRole.AUDITOR)
    played.vote()
    assert played.decisions() == [0, 0, 1, 1], "as a rule the digests come first"
    played.report_progress(time.monotonic() + REPORT_INTERVAL_S)
    records = [record for progress in played.reported("progress") for record in progress.audits]
    assert [(record.step, record.result) for record in records] == [(1, "equal"), (2, "equal")]


def test_a_vote_on_the_last_decided_step_is_answered_during_an_audit() -> None:
    played = PlayedAudit().open()
    for role in (AuditRole.OWNER, AuditRole.AUDITOR):
        played.digest(role)
    played.vote()
    played.log.clear()
    played.cast(Vote(generation=1, step=0, partition=1, squares={1: 2.0}))
    assert [said[:2] for said in played.log] == [("decision", 1)]


@pytest.mark.parametrize("wanted", ["stop", "exclude"])
def test_a_mismatch_keeps_the_step_from_being_decided(wanted: str) -> None:
    played = PlayedAudit(2, on_mismatch=wanted).open()
    played.digest(AuditRole.AUDITOR)
    played.digest(AuditRole.OWNER, WRONG)
    played.vote()
    played.adopt(played.plan(2))
    played.vote(generation=2)
    played.carry_out(played.coordinator.every_second(time.monotonic() + 1e6))
    assert played.decisions() == []
    (report,) = played.reported("audit_mismatch")
    assert (report.step, report.generation, report.node_id, report.error.code) == (1, 1, "", "PS-3007")
    assert [record.result for progress in played.reported("progress") for record in progress.audits] == ["differing"]


def test_a_warning_lets_the_step_be_decided() -> None:
    played = PlayedAudit(1, on_mismatch="warn").open()
    played.vote()
    played.digest(AuditRole.AUDITOR, WRONG)
    played.digest(AuditRole.OWNER)
    assert played.decisions() == [0, 0]
    (warning,) = played.reported("warning")
    assert (warning.step, warning.error.code) == (1, "PS-3007")


def test_under_a_new_plan_the_step_is_audited_again() -> None:
    played = PlayedAudit(2).open()
    played.digest(AuditRole.OWNER)
    played.vote()
    played.trainers = 1
    played.adopt(played.plan(2))
    assert played.decisions() == [], "votes of the older generation count no more"
    played.vote(generation=2)
    assert played.decisions() == [], "trainer 0 has to compute it now"
    played.digest(AuditRole.AUDITOR)
    assert played.decisions() == [0, 0]


def test_nobody_waits_for_ever() -> None:
    played = PlayedAudit(2).open()
    played.vote()
    for now_s in (1e6, 1e6 + MAX_WAIT_S - 1):
        played.carry_out(played.coordinator.every_second(now_s))
    assert played.decisions() == []
    played.carry_out(played.coordinator.every_second(1e6 + MAX_WAIT_S))
    assert played.decisions() == [0, 0]


# ---- over the wire ----


def test_the_third_trainer_is_asked_and_asked_again_when_it_reconnects(tmp_path: Path) -> None:
    network = Network()
    service = played_partition(network, played_spec(3, audit={"share": 1.0}), 0, tmp_path)
    service.adopt(played_plan(LAYOUT, {rank: [rank] for rank in range(3)}))
    fill(service)
    shard = audited_shard(0, 0, 1.0, 3)
    assert shard is not None
    ranks = [(shard + role) % 3 for role in AuditRole]
    pushers, pullers = ([Caller(network, service, channel, rank) for rank in ranks] for channel in ("push", "pull"))

    def send(role: AuditRole, digest: LeafDigest) -> None:
        sender, node = ranks[role], TreeNode(shard, 1)
        header = job_header(FrameKind.AUDIT, generation=1, bucket=int(role), node=node, sender=sender)
        pushers[role].say(header, digest.pack())
        assert pushers[role].acks()[-1] is AckResult.APPLIED

    def asked(caller: Caller) -> list[tuple[int, TreeNode]]:
        return [(header.step, header.node) for header, _ in caller.received if header.kind is FrameKind.ARBITRATE]

    send(AuditRole.OWNER, RIGHT)
    send(AuditRole.AUDITOR, WRONG)
    assert [asked(puller) for puller in pullers] == [[], [], [(0, TreeNode(shard, 1))]]
    again = Caller(network, service, "pull", ranks[AuditRole.ARBITER])
    assert asked(again) == [(0, TreeNode(shard, 1))]

    send(AuditRole.ARBITER, RIGHT)
    (report,) = [r.audit_mismatch for r in service.link.reports if r.HasField("audit_mismatch")]  # type: ignore[attr-defined]
    assert report.error.details["trainers"] == f"trainer-{ranks[AuditRole.AUDITOR]}"
    dismiss(service)
