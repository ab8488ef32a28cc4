"""The step machine: which actions follow from which event, and in what order."""

from __future__ import annotations

import pytest
import torch

from harness.played import played_spec
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode, touched_bits
from pscluster.wire.partition_protocol import CommitDecision
from psserver.partition.actions import (
    ApplyBucket,
    OpenNextStep,
    ReplayEarly,
    ReplicateDecision,
    ResumeReading,
    SendHeld,
    SendVote,
    ServePulls,
    SyncStandby,
    TryVote,
    WriteSnapshot,
)
from psserver.partition.step.machine import StepMachine
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.state import PartitionState

ROOT = TreeNode(0, 1)
LAYOUT = Layout((TensorSpec(names=("w",), shape=(4,), dtype="float32", kind="trained"),))
COMMIT = CommitDecision(generation=1, step=0, kind="commit", scale=1.0)
SAVED = CommitDecision(generation=1, step=0, kind="commit", snapshot=True, last=True)


@pytest.fixture
def machine() -> StepMachine:
    """At version 0 in generation 1, with the one bucket's gradient and the summary in."""
    spec = played_spec(1, train={"optimizer": {"name": "sgd", "lr": 1.0}})
    state = PartitionState.empty(LAYOUT, 0, 1, 0, spec.network.pull_codec)
    made = StepMachine(partition=2)
    made.restart(OpenStep(state, spec, 100), generation=1, version=0)
    assert made.step is not None and not made.is_complete()
    made.step.offer_trained(0, ROOT, torch.ones(16), lambda: None)
    made.step.offer_summary(ROOT, Summary(loss_sum=1, weight=1, samples=1, touched=touched_bits([0], 1)))
    return made


def test_a_complete_step_is_voted_on_once_and_repeated_on_request(machine: StepMachine) -> None:
    assert machine.is_complete() and machine.vote_again() == []
    (action,) = machine.vote()
    assert isinstance(action, SendVote)
    assert (action.vote.partition, action.vote.step, action.vote.generation) == (2, 0, 1)
    assert not machine.is_complete() and machine.vote_again() == [action]
    machine.adopt(3)
    (again,) = machine.vote_again()
    assert isinstance(again, SendVote) and again.vote.generation == 3


def test_a_standby_acknowledges_where_a_partition_votes(machine: StepMachine) -> None:
    machine.stands_by = True
    assert machine.vote() == machine.vote_again() == [SendHeld()]


@pytest.mark.parametrize("decision", [COMMIT, SAVED], ids=["plain", "saved"])
def test_a_decision_is_replicated_before_the_sums_change_and_ends_in_the_next_step(
    machine: StepMachine, decision: CommitDecision
) -> None:
    machine.vote()
    assert machine.receive_decision(decision) == [ReplicateDecision(decision), OpenNextStep(decision)]
    assert machine.step is not None and machine.step.is_complete, "the sums are intact until the next step is opened"
    assert machine.open_next(decision) == [ApplyBucket(0)]
    assert machine.is_updating and (machine.version, machine.versions) == (0, {0: 0})
    snapshot = [WriteSnapshot(last=True)] if decision.snapshot else []
    assert machine.apply(0) == [ServePulls(), *snapshot, SyncStandby(), ReplayEarly(), TryVote()]
    assert not machine.is_updating and (machine.version, machine.versions) == (1, {0: 1})


def test_a_standby_writes_no_snapshot_and_reads_on(machine: StepMachine) -> None:
    machine.stands_by = True
    machine.vote()
    machine.receive_decision(SAVED)
    machine.open_next(SAVED)
    assert machine.apply(0) == [ServePulls(), ResumeReading(), TryVote()]


def test_a_skipped_step_changes_no_bucket(machine: StepMachine) -> None:
    machine.vote()
    skip = CommitDecision(generation=1, step=0, kind="skip")
    machine.receive_decision(skip)
    assert machine.open_next(skip) == [ServePulls(), SyncStandby(), ReplayEarly(), TryVote()]
    assert machine.version == 1


def test_a_decision_that_does_not_fit_is_dropped(machine: StepMachine) -> None:
    assert machine.receive_decision(COMMIT) == [], "before the vote"
    machine.vote()
    assert machine.receive_decision(CommitDecision(generation=2, step=0, kind="commit")) == []
    assert machine.receive_decision(CommitDecision(generation=1, step=1, kind="commit")) == []
    assert machine.receive_decision(CommitDecision(generation=1, step=0, kind="stop")) == [], "nothing follows a stop"
    assert not machine.is_updating


def test_a_restore_in_mid_update_leaves_nothing_to_continue(machine: StepMachine) -> None:
    machine.vote()
    machine.receive_decision(COMMIT)
    machine.open_next(COMMIT)
    machine.decision = None
    assert machine.next_update() == []
