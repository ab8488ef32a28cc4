"""The coordinator partition's part: it collects votes, gives decisions, says what comes next, evaluates, and
reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pscluster.agent.status import detail_of
from pscluster.errors import FrameError, NonFiniteError, PsError, TaskError
from pscluster.job.spec import JobSpec
from pscluster.step.summary import Statistics, Summary, add_statistics
from pscluster.step.tree import TreeNode, tree_of
from pscluster.v1.plan_pb2 import (
    Evaluated,
    Failure,
    Finished,
    Plan,
    ProcessReport,
    Progress,
    StepRecord,
)
from pscluster.wire.protocol import Action, Directive, Outcome
from psserver.partition.coordinator.decisions import decide, next_action
from psserver.partition.replication.metadata import MAX_RECORDS, ReplicatedMetadata
from psserver.partition.step import commit
from psserver.partition.step.commit import CommitDecision, Vote
from psserver.partition.step.schedule import learning_rate
from psserver.partition.step.sums import Entry, Sums

REPORT_INTERVAL_S = 1.0


@dataclass(kw_only=True)
class Outputs:
    """What the coordinator asks of the process around it. None of them blocks."""

    send_decision: Callable[[int, CommitDecision], None]  # to one partition
    send_vote_request: Callable[[int], None]  # asks a partition for its vote
    direct: Callable[[], None]  # tell every trainer `Coordinator.directive` (again)
    send_merged: Callable[[], None]  # tell the trainer of shard 0 `Coordinator.merged`
    report: Callable[[ProcessReport], None]
    evaluated: Callable[[int, Mapping[str, float]], None] = lambda _version, _metrics: None  # before anything follows


def _statistics_sums(num_shards: int) -> Sums[Statistics]:
    return Sums(tree_of(num_shards), lambda left, right, _: add_statistics(left, right))


@dataclass(kw_only=True)
class Coordinator:
    """Made anew at each restore, at the restored version. On the partition's thread."""

    spec: JobSpec
    plan: Plan
    out: Outputs
    state: commit.CoordinatorState
    joined: set[int] = field(default_factory=set)
    action: Action | None = None
    evaluated: int = -1
    saved: int = 0
    undecided: int = (
        -1
    )  # the step that the coordinator before this one may have decided: no stop takes effect before it
    merged: Statistics | None = None
    records: list[StepRecord] = field(default_factory=list)
    summaries: dict[int, Summary] = field(default_factory=dict)  # of the open step and the one before
    _statistics: Sums[Statistics] = field(init=False)
    _reported_step: int = -1
    _reported_at: float = -math.inf
    _is_over: bool = False

    def __post_init__(self) -> None:
        self._statistics = _statistics_sums(self.spec.train.num_shards)

    @classmethod
    def at(cls, spec: JobSpec, plan: Plan, out: Outputs) -> Coordinator:
        """The coordinator at a plan's resume step."""
        state = commit.CoordinatorState(
            num_partitions=spec.servers.partitions, generation=plan.generation, step=plan.resume_step
        )
        return cls(spec=spec, plan=plan, out=out, state=state, saved=plan.resume_step)

    @classmethod
    def taking_over(
        cls, spec: JobSpec, plan: Plan, out: Outputs, member: commit.Member, notes: ReplicatedMetadata
    ) -> Coordinator:
        """The coordinator in what was its standby: at the version that it holds, with the last decision to repeat.

        What was reported before is reported again, in case that was lost: the master drops what it knows."""
        state = commit.CoordinatorState(
            num_partitions=spec.servers.partitions,
            generation=plan.generation,
            step=member.step,
            last=member.last_decision,
        )
        coordinator = cls(
            spec=spec,
            plan=plan,
            out=out,
            state=state,
            saved=notes.saved,
            evaluated=notes.evaluated,
            undecided=member.step if member.vote is not None else -1,
            records=list(notes.records),
        )
        for evaluation in notes.evaluations:
            coordinator._report_evaluated(evaluation.step, evaluation.metrics)
        return coordinator

    @property
    def version(self) -> int:
        """The newest committed version."""
        return self.state.step

    @property
    def is_open(self) -> bool:
        """Every partition holds the version: trainers may be told what to do."""
        return self.action is not None

    @property
    def directive(self) -> Directive:
        """What happens at the committed version; once that is open."""
        assert self.action is not None
        return Directive(self.plan.generation, self.version, self.action)

    def adopt(self, plan: Plan) -> None:
        """A new generation without a restore: votes are called for anew; a stop may take effect."""
        self.plan = plan
        self.state = commit.coordinator_adopts(self.state, plan.generation)
        for index in sorted(self.joined):
            self.out.send_vote_request(index)  # it may have heard of the plan first, and voted too early
        if not self.is_open:
            return
        if self.merged is not None:
            self.out.send_merged()
        self._choose_action()

    def join(self, index: int, step: int, last: CommitDecision | None = None) -> None:
        """A partition holds `step`, which `last` made. The last one to come opens the job."""
        self.joined.add(index)
        if step in (self.version - 1, self.version):
            self.out.send_vote_request(
                index
            )  # it missed the last decision, or its vote came before this coordinator could take it
        if step == self.version + 1 and last is not None:
            self._learn(last)
        if len(self.joined) == self.state.num_partitions and not self.is_open:
            self._choose_action()
            self.report_progress(0.0, force=True)

    def vote(self, vote: Vote) -> None:
        """A partition's vote; the last one decides the step."""
        if vote.step == self.version and (self._is_over or self.action in ("finish", "hold")):
            return  # the job ends or rests here: what completes the next step now would take it past its digest or move
        self.state, decision, to_all = commit.receive_vote(self.state, vote, self._decide)
        if decision is None:
            return
        if not to_all:
            self.out.send_decision(vote.partition, decision)
            return
        self._decided(decision)
        for index in range(self.state.num_partitions):
            self.out.send_decision(index, decision)

    def _learn(self, last: CommitDecision) -> None:
        """A partition carried out a decision that this coordinator, which has just taken over, did not hear of."""
        self.state, decision = commit.coordinator_learns(self.state, last)
        if decision is None:
            return
        if decision.kind == "stop" or self.is_open:
            self._decided(decision)
        else:
            self._record(decision)  # what comes next is said when all have joined
        for index in range(self.state.num_partitions):
            self.out.send_decision(index, decision)

    def take_summary(self, summary: Summary) -> None:
        """The open step's summary is complete; before this partition's own vote."""
        self.summaries = {step: s for step, s in self.summaries.items() if step >= self.version - 1}
        self.summaries[self.version] = summary

    def statistics(self, step: int, node: TreeNode, value: Statistics) -> bool:
        """A node of the evaluation at `step`; False: a duplicate, or of another evaluation."""
        if self.action != "evaluate" or step != self.version or self.merged is not None or self._is_over:
            return False
        try:
            fresh = self._statistics.offer(node, Entry(value))
        except FrameError as error:
            self._is_over = True
            action = "metrics() must give the same names and shapes for every batch"
            self.out.report(ProcessReport(failure=_failure(TaskError(error.cause, action=action), step)))
            return False
        if self._statistics.is_complete:
            self.merged = self._statistics.take_root().value
            self.out.send_merged()
        return fresh

    def outcome(self, step: int, outcome: Outcome) -> None:
        """The trainer of shard 0 finalised an evaluation, or digested the final values. Repeats change nothing."""
        if step != self.version or self._is_over:
            return
        if self.action == "evaluate" and outcome.metrics is not None:
            self._evaluated(outcome.metrics)
        elif self.action == "finish" and outcome.sha256:
            self._is_over = True
            self.report_progress(time.monotonic(), force=True)
            finished = Finished(
                generation=self.plan.generation,
                step=self.version,
                stopped=self.version < self.plan.final_step,
                parameters_sha256=outcome.sha256,
            )
            self.out.report(ProcessReport(finished=finished))

    def report_progress(self, now_s: float, *, force: bool = False, connected: int = 0) -> None:
        """Report the steps committed since the last report, at most once a second unless forced. `now_s` is monotonic:
        a wall clock that is set back would silence the job for as long."""
        due = now_s - self._reported_at >= REPORT_INTERVAL_S or len(self.records) >= MAX_RECORDS
        if not self.is_open and not (force and self.records):
            return
        if not (force or (due and self._reported_step != self.version)):
            return
        was_stopped = self.state.last is not None and self.state.last.kind == "stop"
        progress = Progress(
            generation=self.plan.generation,
            step=self.version - was_stopped,  # a step that is stopped at makes no version
            records=self.records,
            connected_trainers=connected,
            held=self.action == "hold",
        )
        self.out.report(ProcessReport(progress=progress))
        self.records, self._reported_step, self._reported_at = [], self.version, now_s

    def _decide(self, votes: Mapping[int, Vote]) -> CommitDecision:
        return decide(
            votes,
            self.summaries[self.version],
            self.spec,
            self.plan.final_step,
            generation=self.plan.generation,
            stop=self.plan.stop,
            save=self.plan.save,
        )

    def _decided(self, decision: CommitDecision) -> None:
        summary = self.summaries[decision.step]
        if decision.kind == "stop":
            self._is_over = True
            led_there = Progress(generation=self.plan.generation, step=decision.step, records=self.records)
            self.out.report(ProcessReport(progress=led_there))
            self.out.report(ProcessReport(failure=_non_finite(decision.step, summary)))
            return
        self._record(decision)
        self._choose_action()

    def _record(self, decision: CommitDecision) -> None:
        self.records.append(step_record(self.spec, self.plan.final_step, decision, self.summaries[decision.step]))
        if decision.snapshot:
            self.saved = self.version

    def _choose_action(self) -> None:
        """Say what comes at the committed version, if that is news."""
        if self._is_over:
            return
        action = next_action(
            self.version,
            self.spec,
            self.plan.final_step,
            evaluated=self.evaluated,
            saved=self.saved,
            stop=self.plan.stop and self.version > self.undecided,
            save=self.plan.save,
        )
        if action != "evaluate":
            self.merged = None
        elif self.action != "evaluate":
            self._statistics = _statistics_sums(self.spec.train.num_shards)
            self.merged = None
        self.action = action
        self.out.direct()
        if action == "hold":
            # Before its snapshot's parts: the master moves upon both.
            self.report_progress(time.monotonic(), force=True)

    def _evaluated(self, metrics: Mapping[str, float]) -> None:
        self.evaluated = self.version
        self.merged = None
        self.report_progress(time.monotonic(), force=True)
        self.out.evaluated(self.version, metrics)
        self._report_evaluated(self.version, metrics)
        self._choose_action()

    def _report_evaluated(self, version: int, metrics: Mapping[str, float]) -> None:
        if metrics:
            report = Evaluated(generation=self.plan.generation, step=version, metrics=dict(metrics))
            self.out.report(ProcessReport(evaluated=report))


def step_record(spec: JobSpec, final_step: int, decision: CommitDecision, summary: Summary) -> StepRecord:
    """What people read of a step that was committed or skipped just now."""
    train = spec.train
    return StepRecord(
        step=decision.step + 1,
        loss=summary.loss_sum / summary.weight if summary.weight else math.nan,
        grad_norm=decision.norm,
        lr=learning_rate(train.optimizer.lr, train.schedule, decision.step, final_step),
        weight=summary.weight,
        samples=summary.samples,
        skipped=decision.kind == "skip",
        time_s=time.time(),
    )


def _non_finite(step: int, summary: Summary) -> Failure:
    what = "the loss" if not np.isfinite(summary.loss_sum) else "a gradient"
    error = NonFiniteError(f"{what} is not finite in step {step + 1}", details={"step": str(step + 1)})
    return _failure(error, step + 1)


def _failure(error: PsError, step: int) -> Failure:
    detail = detail_of(error)
    return Failure(error=detail, step=step)
