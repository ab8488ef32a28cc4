"""Which shard is audited, and by whom: pure, and the same for everybody who asks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.step.audit import AuditRule, audited_shard, roles_of
from pscluster.v1.plan_pb2 import Plan, ShardRange, TrainerPlacement

GOLDEN = [0, 3, 5, 0, 2, 3, 4, 3, 5, 0]
SEEDS = st.integers(0, 2**63 - 1)


def plan(*trainers: str) -> Plan:
    """Trainers in the order of ranks, each as "class first-last", "class" (no shards), "" (not active)."""
    placements = []
    for rank, text in enumerate(trainers):
        kind, _, shards = text.partition(" ")
        first, _, last = shards.partition("-")
        runs = [ShardRange(first=int(first), count=int(last) - int(first) + 1)] if shards else []
        placements.append(
            TrainerPlacement(
                rank=rank, attempt=1, node_id=f"worker-{rank}", active=bool(text), numerics_class=kind, shards=runs
            )
        )
    return Plan(trainers=placements)


def ranks(found: Plan, shard: int) -> tuple[int, int, int | None]:
    roles = roles_of(found, shard)
    assert roles is not None
    return roles.owner.rank, roles.auditor.rank, roles.arbiter.rank if roles.arbiter is not None else None


@given(seed=SEEDS, step=st.integers(0, 2**40), num_shards=st.integers(1, 500))
def test_every_step_has_an_audited_shard_where_all_are_audited_and_none_where_none_is(
    seed: int, step: int, num_shards: int
) -> None:
    shard = audited_shard(seed, step, 1.0, num_shards)
    assert shard is not None and 0 <= shard < num_shards
    assert audited_shard(seed, step, 1.0, num_shards) == shard
    assert audited_shard(seed, step, 0.0, num_shards) is None
    assert AuditRule(seed=seed, num_shards=num_shards).shard_of(step) is None


@given(seed=SEEDS, small=st.floats(0, 1), large=st.floats(0, 1))
def test_a_larger_share_audits_the_same_shards_and_more(seed: int, small: float, large: float) -> None:
    small, large = sorted((small, large))
    for step in range(30):
        found = audited_shard(seed, step, small, 7)
        assert found is None or audited_shard(seed, step, large, 7) == found


def test_shares_and_shards_are_as_likely_as_they_should_be() -> None:
    found = [audited_shard(3, step, 0.25, 5) for step in range(20_000)]
    audited = Counter(shard for shard in found if shard is not None)
    assert sum(audited.values()) == pytest.approx(5000, rel=0.05)
    assert sorted(audited) == [0, 1, 2, 3, 4]
    assert all(count == pytest.approx(1000, rel=0.15) for count in audited.values())


def test_the_choice_is_the_same_for_ever() -> None:
    assert [audited_shard(0, step, 1.0, 7) for step in range(10)] == GOLDEN


def test_the_next_trainer_audits_and_the_one_after_it_arbitrates() -> None:
    found = plan("a 0-1", "a 2-3", "a 4-6")
    assert ranks(found, 1) == (0, 1, 2)
    assert ranks(found, 2) == (1, 2, 0)
    assert ranks(found, 6) == (2, 0, 1)


def test_nobody_else_of_its_class_and_it_audits_itself() -> None:
    found = plan("a 0-1", "b 2-3", "b 4-6")
    assert ranks(found, 0) == (0, 0, None)
    assert ranks(found, 2) == (1, 2, None)
    assert ranks(found, 4) == (2, 1, None)


def test_of_two_nobody_can_arbitrate() -> None:
    assert ranks(plan("a 0-2", "a 3-6"), 3) == (1, 0, None)


def test_one_without_shards_does_not_audit_but_arbitrates() -> None:
    found = plan("a 0-2", "a", "a 3-6")
    assert ranks(found, 0) == (0, 2, 1)
    assert ranks(found, 3) == (2, 0, 1)
    assert ranks(plan("a 0-6", "a"), 3) == (0, 0, 1)


def test_one_that_is_not_counted_on_has_no_role() -> None:
    assert ranks(plan("a 0-2", "", "a 3-6"), 0) == (0, 2, None)
    assert roles_of(plan("", "a 3-6"), 0) is None
