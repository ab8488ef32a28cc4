"""The coordinator: opens the job, gives decisions, says what comes next, evaluates, reports."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from harness.played import played_plan, played_spec
from pscluster.errors import TaskError
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import Statistics, Summary, TreeNode
from pscluster.v1.plan_pb2 import Plan, ProcessReport
from pscluster.wire.partition_protocol import Evaluation
from pscluster.wire.protocol import Outcome
from psserver.partition.actions import (
    Action,
    BroadcastDirective,
    ReplicateEvaluation,
    Report,
    RequestVote,
    SendDecision,
    SendMerged,
)
from psserver.partition.coordinator.coordinator import REPORT_INTERVAL_S, Coordinator
from psserver.partition.step.voting import CommitDecision, Vote

LAYOUT = Layout((TensorSpec(names=("w",), shape=(4,), dtype="float32", kind="trained"),))
FINAL_STEP = 6


class Played:
    """A coordinator of two partitions and two shards; `log` keeps what it says, in order."""

    def __init__(self, *, resume_step: int = 0, **sections: Any) -> None:
        sections = {"evaluate": {"every_steps": 2}, "durability": {"every_steps": 3}, **sections}
        self.spec = played_spec(2, 2, **sections)
        self.log: list[tuple[Any, ...]] = []
        self.reports: list[ProcessReport] = []
        self.replicated: list[tuple[Evaluation, int]] = []  # and how much was reported before
        self.coordinator = Coordinator.at(self.spec, self.plan(1, resume_step=resume_step))

    def carry_out(self, actions: list[Action]) -> None:
        """Note what the coordinator asks for."""
        for action in actions:
            match action:
                case SendDecision(index, decision):
                    self.log.append(("decision", index, decision))
                case RequestVote(index, step):
                    assert step == self.coordinator.version
                    self.log.append(("call", index))
                case BroadcastDirective(directive):
                    self.log.append(("direct", directive.version, directive.action))
                case SendMerged(step, ranks, body):
                    assert (step, ranks) == (self.coordinator.version, {0}) and body
                    self.log.append(("merged",))
                case Report(report):
                    self.reports.append(report)
                case ReplicateEvaluation(evaluation):
                    self.replicated.append((evaluation, len(self.reports)))
                case _:
                    raise AssertionError(f"not a coordinator's: {action}")

    def join(self, index: int, step: int) -> None:
        self.carry_out(self.coordinator.join(index, step))

    def cast(self, vote: Vote) -> None:
        self.carry_out(self.coordinator.vote(vote))

    def adopt(self, plan: Plan) -> None:
        self.carry_out(self.coordinator.adopt(plan))

    def outcome(self, step: int, outcome: Outcome) -> None:
        self.carry_out(self.coordinator.outcome(step, outcome))

    def statistics(self, step: int, node: TreeNode, value: Statistics) -> None:
        self.carry_out(self.coordinator.statistics(step, node, value))

    def report_progress(self, now_s: float, *, force: bool = False) -> None:
        self.carry_out(self.coordinator.report_progress(now_s, force=force))

    def plan(self, generation: int, **fields: Any) -> Any:
        return played_plan(LAYOUT, {0: [0, 1]}, generation=generation, partitions=2, final_step=FINAL_STEP, **fields)

    def open(self) -> Played:
        for index in (0, 1):
            self.join(index, self.coordinator.version)
        self.log.clear()
        return self

    def vote(self, *, loss: float = 3.0, generation: int = 1, finite: bool = True) -> None:
        """Both partitions vote on the open step."""
        step = self.coordinator.version
        self.coordinator.take_summary(Summary(loss_sum=loss, weight=2.0, samples=2, touched=b"\1"))
        for index in (1, 0):
            squares = {index: 2.0}
            vote = Vote(generation=generation, step=step, partition=index, squares=squares, finite=finite)
            self.cast(vote)

    def evaluate(self) -> None:
        """Both shards send their statistics, and shard 0's trainer the finalised metrics."""
        for shard in (0, 1):
            self.statistics(self.coordinator.version, TreeNode(shard, 1), np.array([1.0, 2.0]))
        self.outcome(self.coordinator.version, Outcome(metrics={"loss": 0.5}))

    def directives(self) -> list[str]:
        return [f"{said[2]} {said[1]}" for said in self.log if said[0] == "direct"]

    def reported(self, body: str) -> list[Any]:
        return [getattr(report, body) for report in self.reports if report.WhichOneof("body") == body]


def test_the_job_opens_when_every_partition_holds_the_version() -> None:
    played = Played()
    played.join(1, 0)
    played.join(1, 0)
    assert not played.coordinator.is_open and played.directives() == []

    played.join(0, 0)

    assert played.coordinator.is_open
    assert played.directives() == ["train 0"]
    assert [p.step for p in played.reported("progress")] == [0], "the first report says that it runs"


def test_a_partition_that_joins_again_does_not_open_the_job_again() -> None:
    played = Played().open()
    played.join(1, 0)

    assert played.log == [("call", 1)]


def test_a_partition_that_missed_the_last_decision_is_called() -> None:
    played = Played().open()
    played.vote()
    played.log.clear()
    played.join(1, 0)
    assert played.log == [("call", 1)]

    played.cast(Vote(generation=1, step=0, partition=1, squares={1: 2.0}))

    assert [said[:2] for said in played.log] == [("call", 1), ("decision", 1)], "to the one that asked, alone"


@pytest.mark.parametrize("joins_first", [True, False])
def test_a_vote_that_came_before_the_coordinator_heard_of_its_plan_is_called_for(joins_first: bool) -> None:
    played = Played()
    early = Vote(generation=2, step=0, partition=1, squares={1: 2.0})
    if joins_first:
        played.join(1, 0)
    played.cast(early)
    played.log.clear()

    played.adopt(played.plan(2))  # not all have joined yet
    if not joins_first:
        played.join(1, 0)

    assert played.log == [("call", 1)]
    played.cast(early)
    played.join(0, 0)
    played.coordinator.take_summary(Summary(loss_sum=3.0, weight=2.0, samples=2, touched=b"\1"))
    played.cast(Vote(generation=2, step=0, partition=0, squares={0: 2.0}))
    assert played.directives() == ["train 0", "train 1"]


def test_the_last_vote_decides_for_all_and_trainers_hear_first() -> None:
    played = Played().open()
    played.vote()

    assert [said[:2] for said in played.log] == [("direct", 1), ("decision", 0), ("decision", 1)]
    decision: CommitDecision = played.log[1][2]
    assert (decision.step, decision.kind, decision.norm, decision.scale) == (0, "commit", 1.0, 0.5)


def test_a_whole_job_in_order() -> None:
    played = Played().open()
    while played.coordinator.activity != "finish":
        played.evaluate() if played.coordinator.activity == "evaluate" else played.vote()
    played.outcome(FINAL_STEP, Outcome(sha256="abc"))

    said = "train 1,evaluate 2,train 2,train 3,evaluate 4,train 4,train 5,evaluate 6,finish 6"
    assert played.directives() == said.split(",")
    assert [e.step for e in played.reported("evaluated")] == [2, 4, 6]
    ((finished),) = played.reported("finished")
    assert (finished.step, finished.stopped, finished.parameters_sha256) == (6, False, "abc")
    records = [record for progress in played.reported("progress") for record in progress.records]
    assert [(r.step, r.loss, r.grad_norm, r.skipped) for r in records] == [
        (step, 1.5, 1.0, False) for step in range(1, 7)
    ]
    written = [v[2].step + 1 for v in played.log if v[0] == "decision" and v[1] == 0 and v[2].snapshot]
    assert written == [2, 3, 4, 6]


def test_asked_to_save_it_rests_after_the_next_step_and_goes_on_when_told() -> None:
    played = Played(evaluate={"every_steps": 100}, durability={"every_steps": 100}).open()
    played.vote()
    played.adopt(played.plan(2, save=True))
    assert played.coordinator.activity == "train", "version 1 is not written"
    played.vote(generation=2)
    assert played.directives()[-1] == "hold 2"
    assert [v[2].snapshot for v in played.log if v[0] == "decision" and v[1] == 0] == [False, True]
    newest = played.reported("progress")[-1]
    assert (newest.step, newest.held, [r.step for r in newest.records]) == (2, True, [1, 2])
    said = len(played.log)
    played.vote(generation=2)
    assert (played.coordinator.version, len(played.log)) == (2, said), "nothing is decided while it rests"
    played.adopt(played.plan(3))
    assert played.directives()[-1] == "train 2"
    played.vote(generation=3)
    assert played.coordinator.version == 3


def test_at_a_version_that_is_written_it_rests_at_once_and_says_so_under_each_plan() -> None:
    played = Played().open()
    for _ in range(2):
        played.vote()
    assert played.coordinator.activity == "evaluate"
    for generation in (2, 3):
        played.adopt(played.plan(generation, save=True))
        newest = played.reported("progress")[-1]
        assert (newest.generation, newest.step, newest.held) == (generation, 2, True)
    played.adopt(played.plan(4))
    assert played.directives()[-1] == "evaluate 2"
    played.evaluate()
    assert [e.step for e in played.reported("evaluated")] == [2]


def test_an_evaluation_takes_each_node_once_and_only_of_its_version() -> None:
    played = Played().open()
    played.vote()
    played.vote()
    one = np.array([1.0])
    assert played.coordinator.activity == "evaluate"
    held = played.coordinator._statistics.holds
    played.statistics(1, TreeNode(0, 1), one)
    assert not held(TreeNode(0, 1)), "of another version"
    played.statistics(2, TreeNode(1, 1), one)
    assert held(TreeNode(1, 1))
    played.statistics(2, TreeNode(1, 1), one)  # a duplicate
    assert played.coordinator.merged is None
    played.statistics(2, TreeNode(0, 2), one * 5)  # it covers what came before

    assert played.coordinator.merged is not None and played.coordinator.merged.tolist() == [5.0]
    assert played.log[-1][0] == "merged"
    said = len(played.log)
    played.statistics(2, TreeNode(0, 1), one)
    assert played.coordinator.merged.tolist() == [5.0] and len(played.log) == said, "too late"


def test_outcomes_are_taken_once_and_in_their_place() -> None:
    played = Played().open()
    played.outcome(0, Outcome(metrics={"loss": 1.0}))
    played.outcome(0, Outcome(sha256="x"))
    assert played.reported("evaluated") == played.reported("finished") == []
    played.vote()
    played.vote()
    played.outcome(1, Outcome(metrics={"loss": 1.0}))
    played.outcome(2, Outcome(metrics={"loss": 1.0}))
    played.outcome(2, Outcome(metrics={"loss": 1.0}))

    assert [(e.step, dict(e.metrics)) for e in played.reported("evaluated")] == [(2, {"loss": 1.0})]
    ((replicated, reports_before),) = played.replicated
    assert (replicated.step, dict(replicated.metrics)) == (2, {"loss": 1.0})
    assert played.reports[reports_before].WhichOneof("body") == "evaluated", "the standby gets it first"


def test_the_end_is_reported_once() -> None:
    played = Played(train={"max_steps": 1}).open()
    while played.coordinator.activity != "finish":
        played.evaluate() if played.coordinator.activity == "evaluate" else played.vote()
    for _ in range(3):
        played.outcome(FINAL_STEP, Outcome(sha256="abc"))

    assert len(played.reported("finished")) == 1


def test_a_new_generation_calls_for_votes_and_says_again_what_goes_on() -> None:
    played = Played().open()
    played.cast(Vote(generation=1, step=0, partition=1))
    played.adopt(played.plan(2))

    assert played.log == [("call", 0), ("call", 1), ("direct", 0, "train")]
    played.log.clear()
    played.cast(Vote(generation=1, step=0, partition=0))
    assert played.log == [], "a vote of the past"
    played.vote(generation=2)
    assert played.directives() == ["train 1"]


def test_a_new_generation_in_mid_evaluation_keeps_what_is_in() -> None:
    played = Played().open()
    played.vote()
    played.vote()
    played.statistics(2, TreeNode(0, 1), np.array([1.0]))
    played.adopt(played.plan(2))
    played.statistics(2, TreeNode(1, 1), np.array([2.0]))
    assert played.coordinator.merged is not None and played.coordinator.merged.tolist() == [3.0]
    played.log.clear()

    played.adopt(played.plan(3))

    assert played.log == [("call", 0), ("call", 1), ("merged",), ("direct", 2, "evaluate")]


@pytest.mark.parametrize("pause_after", [0, 1, 2, 3])
def test_a_pause_in_mid_evaluation_loses_nothing(pause_after: int) -> None:
    """A partition is about to move: trainers have computed shards that they do not compute again."""
    played = Played(evaluate={"every_steps": 3}).open()
    for _ in range(3):
        played.vote()
    assert (played.coordinator.activity, played.coordinator.saved) == ("evaluate", 3)
    version, value = played.coordinator.version, np.array([1.0, 2.0])
    sends = [
        lambda: played.statistics(version, TreeNode(0, 1), value),
        lambda: played.statistics(version, TreeNode(1, 1), value),
        lambda: played.outcome(version, Outcome(metrics={"loss": 0.5})),
    ]

    for number, send in enumerate(sends):
        if number == pause_after:
            played.adopt(played.plan(2, save=True))
            assert played.coordinator.activity == "hold"
        send()
    played.adopt(played.plan(3))

    assert played.coordinator.evaluated == version
    assert [dict(r.evaluated.metrics) for r in played.reports if r.HasField("evaluated")] == [{"loss": 0.5}]
    assert played.coordinator.activity == "train"


def test_statistics_that_do_not_add_fail_the_job_by_name() -> None:
    played = Played().open()
    played.vote()
    played.vote()
    played.statistics(2, TreeNode(0, 1), np.array([1.0]))
    for _ in range(2):
        played.statistics(2, TreeNode(1, 1), np.array([1.0, 2.0]))
    failures = [report.failure for report in played.reports if report.WhichOneof("body") == "failure"]
    assert [failure.error.code for failure in failures] == [TaskError.code]
    assert "2 numbers do not add" in failures[0].error.cause
    assert failures[0].step == 2


def test_before_all_have_joined_a_generation_is_only_noted() -> None:
    played = Played()
    played.adopt(played.plan(2))

    assert played.log == []
    played.open()
    played.vote(generation=2)
    assert played.directives() == ["train 1"]


def test_a_stop_waits_for_a_version_that_is_written() -> None:
    played = Played().open()
    played.vote()
    played.adopt(played.plan(2, stop=True))
    assert played.directives()[-1] == "train 1", "version 1 is not written: one step more"
    played.vote(generation=2)
    assert played.directives()[-1] == "finish 2"
    assert played.log[-1][2].snapshot and played.log[-1][2].last

    played.outcome(2, Outcome(sha256="abc"))

    ((finished),) = played.reported("finished")
    assert (finished.step, finished.stopped, finished.generation) == (2, True, 2)


def test_a_stop_at_a_written_version_finishes_at_once() -> None:
    played = Played(resume_step=3).open()
    played.adopt(played.plan(2, stop=True))

    assert played.directives() == ["finish 3"]


@pytest.mark.parametrize(("loss", "finite", "what"), [(math.nan, True, "the loss"), (1.0, False, "a gradient")])
def test_what_is_not_finite_stops_the_job_by_name(loss: float, finite: bool, what: str) -> None:
    played = Played().open()
    played.vote(loss=loss, finite=finite)

    ((failure),) = played.reported("failure")
    assert failure.error.code == "PS-2005"
    assert what in failure.error.cause and "step 1" in failure.error.cause
    assert failure.step == 1
    assert played.directives() == [], "nothing comes after it"
    assert {said[2].kind for said in played.log} == {"stop"}


@pytest.mark.parametrize("force", [False, True])
def test_a_step_that_is_stopped_at_is_never_told_as_made(force: bool) -> None:
    """However long its processes live on."""
    played = Played(evaluate={}).open()
    played.vote()
    played.vote(finite=False)
    played.report_progress(1e12, force=force)

    assert played.reported("failure")
    assert max(progress.step for progress in played.reported("progress")) == 1


def test_a_skipped_step_is_recorded_as_such() -> None:
    played = Played(on_nonfinite="skip").open()
    played.vote(finite=False)
    played.vote()
    played.report_progress(1e12)

    records = [record for progress in played.reported("progress") for record in progress.records]
    assert [(r.step, r.skipped) for r in records] == [(1, True), (2, False)]
    assert math.isnan(records[0].grad_norm)


def test_progress_is_reported_once_a_second_when_there_is_news() -> None:
    played = Played(evaluate={}).open()

    def reported_at(now: float) -> list[int]:
        played.reports.clear()
        played.report_progress(now)
        return [record.step for progress in played.reported("progress") for record in progress.records]

    played.vote()
    assert reported_at(1000.0) == [1]
    played.vote()
    played.vote()
    assert reported_at(1000.5) == [], "not yet"
    assert reported_at(1001.0) == [2, 3]
    assert reported_at(1100.0) == [] and played.reports == [], "no news"


def test_a_wall_clock_that_is_set_back_silences_nobody() -> None:
    """Reports are timed by the monotonic clock, as those that an evaluation forces in between."""
    played = Played().open()
    played.vote()
    played.vote()
    played.evaluate()
    played.reports.clear()
    played.vote()
    played.report_progress(time.monotonic() + REPORT_INTERVAL_S)
    assert [report.step for report in played.reported("progress")] == [3]


def test_a_coordinator_that_resumes_goes_on_from_there() -> None:
    played = Played(resume_step=4)
    assert played.coordinator.version == 4
    played.open()
    assert played.coordinator.activity == "evaluate", "evaluated again: the same numbers"
    played.evaluate()
    played.vote()

    assert played.directives() == ["train 4", "train 5"]


def test_a_step_that_completes_after_the_end_was_called_is_not_made() -> None:
    """A stop came at a written version; what trainers had sent of the next step completes it all the same."""
    played = Played(resume_step=3).open()
    played.adopt(played.plan(2, stop=True))
    assert played.directives() == ["finish 3"]
    played.vote(generation=2)
    assert played.coordinator.version == 3

    played.outcome(3, Outcome(sha256="abc"))
    played.vote(generation=2)

    assert played.coordinator.version == 3
    assert not any(said[0] == "decision" for said in played.log)
