"""What a trainer does for audits: the second computation before its own shards, a third one when it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness.played import played_plan
from harness.played_job import LAYOUT
from pscluster.job.optimizer import OptimizerSection
from pscluster.step.audit import AuditRule
from pscluster.step.tree import TreeNode, tree_of
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.protocol import Directive
from psworker.replica import Replica
from psworker.trainer.gradients.accumulate import Accumulator
from psworker.trainer.gradients.digests import TensorDigests
from psworker.trainer.work import Done, Work, find_work

RULE = AuditRule(seed=3, share=1.0, num_shards=6)
SHARD = RULE.shard_of(4)
assert SHARD is not None


def plan(generation: int = 1, **fields: Any) -> Plan:
    """Trainer 1 has the audited shard; 2 audits, 0 arbitrates."""
    assert SHARD is not None
    others = [shard for shard in range(6) if shard != SHARD]
    return played_plan(LAYOUT, {0: others[:2], 1: [SHARD], 2: others[2:]}, generation=generation, **fields)


def works(rank: int, *, action: Any = "train", arbitration: tuple[int, int] | None = None, **fields: Any) -> list[Work]:
    """All that a trainer does at version 4, in order."""
    done: dict[Any, set[int]] = {}
    found = []
    directive = Directive(1, 4, action)
    while work := find_work(plan(**fields), directive, None, set(), rank, done, RULE, arbitration):
        done.setdefault(work.key, set()).update(work.shards)
        found.append(work)
    return found


def actions(rank: int, **fields: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(work.action, work.shards) for work in works(rank, **fields)]


def test_the_auditor_computes_the_shard_first_and_nobody_else_does() -> None:
    assert SHARD is not None
    assert [action for action, _ in actions(0)] == ["train"]
    assert actions(1) == [("train", (SHARD,))]
    assert actions(2)[0] == ("audit", (SHARD,)) and [action for action, _ in actions(2)] == ["audit", "train"]


def test_the_arbiter_computes_it_when_its_own_shards_are_done() -> None:
    assert SHARD is not None
    assert actions(0, arbitration=(4, SHARD))[1:] == [("arbitrate", (SHARD,))]
    assert [action for action, _ in actions(0, arbitration=(3, SHARD))] == ["train"], "that step is over"


@pytest.mark.parametrize("action", ["evaluate", "finish", "hold"])
def test_only_steps_are_audited(action: str) -> None:
    assert SHARD is not None
    assert not {"audit", "arbitrate"} & {found for found, _ in actions(2, action=action, arbitration=(4, SHARD))}


def test_only_another_coordinator_needs_the_digest_again() -> None:
    (audit, _), (moved, _) = works(2), works(2, generation=2, moved_generation=2)
    assert audit.key == moved.key
    again = works(2, generation=2, moved_generation=2, coordinator_generation=2)[0]
    assert (again.action, again.key == audit.key) == ("audit", False)


def test_without_audits_there_is_no_other_work() -> None:
    done: Done = {}
    work = find_work(plan(), Directive(1, 4, "train"), None, set(), 2, done)
    assert work is not None and work.action == "train"


# ---- digests ----


class Audited:
    """A model with buffers, computed for its gradients or only for their digests."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.replica = Replica(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), OptimizerSection())
        self.pushed: list[TreeNode] = []
        self.accumulator = Accumulator(self.replica.layout, self.replica.parameters, tree_of(2), self._push)
        self.flips = False
        self.replica.model[0].weight.register_hook(self._flip)  # type: ignore[operator]

    def _push(self, _work: Work, _bucket: int, node: TreeNode, _gradients: object) -> None:
        self.pushed.append(node)

    def _flip(self, gradient: torch.Tensor) -> torch.Tensor:
        changed = gradient.clone()
        if self.flips:
            changed.view(torch.int32).view(-1)[2] ^= 1
        return changed

    def compute(self, shard: int, *, discards: bool) -> dict[int, int]:
        self.replica.buffers.restore()
        digests = TensorDigests(self.replica.layout)
        self.accumulator.begin(shard, digests, discards=discards)
        batch = torch.arange(12.0).reshape(4, 3) * (shard + 1)
        self.replica.model(batch).sum().backward()
        self.accumulator.finish()
        digests.take_buffers(self.replica, 4.0)
        return digests.found


def test_a_digest_is_the_same_whether_or_not_the_gradient_counts_and_before_it_is_added() -> None:
    audited = Audited()
    first = [audited.compute(shard, discards=True) for shard in (0, 1)]
    assert audited.pushed == [], "nothing is pushed, and nothing kept"
    work = Work(restore_generation=1, generation=1, version=0, action="train")
    audited.accumulator.begin_run(work, [TreeNode(0, 2)])
    second = [audited.compute(shard, discards=False) for shard in (0, 1)]
    assert set(audited.pushed) == {TreeNode(0, 2)}
    assert first == second and first[0] != first[1]
    assert len(first[0]) == len(audited.replica.layout.tensors)


def test_one_bit_of_one_gradient_changes_the_digest_of_that_tensor_alone() -> None:
    audited = Audited()
    right = audited.compute(0, discards=True)
    audited.flips = True
    wrong = audited.compute(0, discards=True)
    differing = [audited.replica.layout.tensors[n].name for n in right if right[n] != wrong[n]]
    assert differing == ["0.weight"]
