"""The coordinator, in partition 0: collects votes, decides steps, directs trainers, merges evaluations, reports."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pscluster.agent.status import detail_of
from pscluster.errors import FrameError, NonFiniteError, TaskError
from pscluster.job.schedule import learning_rate
from pscluster.job.spec import JobSpec
from pscluster.step.audit import AuditRole
from pscluster.step.tree import Statistics, Summary, TreeNode, add_statistics, tree_of
from pscluster.v1.plan_pb2 import Evaluated, Failure, Finished, Plan, ProcessReport, Progress, StepRecord
from pscluster.wire.partition_protocol import CommitDecision, DecisionKind, Evaluation, Vote
from pscluster.wire.protocol import Action as Activity
from pscluster.wire.protocol import Directive, LeafDigest, Outcome, pack_statistics
from psserver.partition import actions
from psserver.partition.actions import Action
from psserver.partition.coordinator.audits import OpenAudit
from psserver.partition.replication.in_sync import MAX_RECORDS, ReplicatedMetadata
from psserver.partition.step import voting
from psserver.partition.step.sums import Entry, Sums
from psserver.partition.step.voting import clip_coefficient, global_norm

REPORT_INTERVAL_S = 1.0


@dataclass(kw_only=True)
class Coordinator:
    """Made anew at each restore, at the restored version. A pure machine: calls return what is to be done, in order."""

    spec: JobSpec
    plan: Plan
    state: voting.CoordinatorState
    joined: set[int] = field(default_factory=set)
    activity: Activity | None = None
    evaluated: int = -1
    saved: int = 0
    undecided: int = -1  # the step that a lost coordinator may have decided: no stop takes effect before it
    merged: Statistics | None = None
    records: list[StepRecord] = field(default_factory=list)
    summaries: dict[int, Summary] = field(default_factory=dict)  # of the open step and the one before
    audits: OpenAudit = field(init=False)
    _audited_votes: dict[int, Vote] = field(default_factory=dict)  # on the open step; they wait for its audit
    _statistics: Sums[Statistics] | None = None
    _evaluating: int = -1  # the version that `_statistics` and `merged` are of
    _reported_step: int = -1
    _reported_at: float = -math.inf
    _is_over: bool = False

    def __post_init__(self) -> None:
        self.audits = OpenAudit(self.spec)
        self.audits.open_step(self.version, self.plan)

    @classmethod
    def at(cls, spec: JobSpec, plan: Plan) -> Coordinator:
        """The coordinator at a plan's resume step."""
        state = voting.CoordinatorState(
            num_partitions=spec.servers.partitions, generation=plan.generation, step=plan.resume_step
        )
        return cls(spec=spec, plan=plan, state=state, saved=plan.resume_step)

    @classmethod
    def taking_over(cls, spec: JobSpec, plan: Plan, member: voting.Member, metadata: ReplicatedMetadata) -> Coordinator:
        """The coordinator in what was its standby: at the version that it holds, with the last decision to repeat."""
        state = voting.CoordinatorState(
            num_partitions=spec.servers.partitions,
            generation=plan.generation,
            step=member.step,
            last=member.last_decision,
        )
        return cls(
            spec=spec,
            plan=plan,
            state=state,
            saved=metadata.saved,
            evaluated=metadata.evaluated,
            undecided=member.step if member.vote is not None else -1,
            records=list(metadata.records),
        )

    @property
    def version(self) -> int:
        """The newest committed version."""
        return self.state.step

    @property
    def is_open(self) -> bool:
        """Every partition holds the version: trainers get directives."""
        return self.activity is not None

    @property
    def directive(self) -> Directive:
        """What happens at the committed version; once that is open."""
        assert self.activity is not None
        return Directive(self.plan.generation, self.version, self.activity)

    def adopt(self, plan: Plan) -> list[Action]:
        """A new generation without a restore: votes are requested anew; a stop may take effect."""
        self.plan = plan
        self.state = voting.coordinator_adopts(self.state, plan.generation)
        self._audited_votes.clear()
        self.audits.adopt(plan)
        # A partition may have adopted the plan first, and voted too early.
        requests: list[Action] = [actions.RequestVote(index, self.version) for index in sorted(self.joined)]
        if not self.is_open:
            return requests
        return [*requests, *self.send_merged(), *self._choose_activity(), *self._settle_audit()]

    def join(self, index: int, step: int, last: CommitDecision | None = None) -> list[Action]:
        """A partition holds `step`, which `last` made. The last one to join opens the job."""
        self.joined.add(index)
        found: list[Action] = []
        if step in (self.version - 1, self.version):
            # It missed the last decision, or its vote arrived before this coordinator could take it.
            found.append(actions.RequestVote(index, self.version))
        if step == self.version + 1 and last is not None:
            found += self._learn(last)
        if len(self.joined) == self.state.num_partitions and not self.is_open:
            found += self._choose_activity()
            found += self.report_progress(0.0, force=True)
        return found

    def vote(self, vote: Vote) -> list[Action]:
        """A partition's vote; the last one decides the step."""
        if vote.step == self.version and (self._is_over or self.activity in ("finish", "hold")):
            return []  # the job ends or rests here: another step would take it past its digest or move
        if vote.step == self.version and self.audits.holds_step:
            self._audited_votes[vote.partition] = vote
            return []
        self.state, decision, to_all = voting.receive_vote(self.state, vote, self._decide)
        if decision is None:
            return []
        if not to_all:
            return [actions.SendDecision(vote.partition, decision)]
        return [*self._decided(decision), *self._send_to_all(decision)]

    def _learn(self, last: CommitDecision) -> list[Action]:
        """A partition carried out a decision that this coordinator, which has just taken over, did not receive."""
        self.state, decision = voting.coordinator_learns(self.state, last)
        if decision is None:
            return []
        found: list[Action] = []
        if decision.kind == "stop" or self.is_open:
            found = self._decided(decision)
        else:
            self._record(decision)  # the directive follows when all have joined
        return [*found, *self._send_to_all(decision)]

    def _send_to_all(self, decision: CommitDecision) -> list[Action]:
        return [actions.SendDecision(index, decision) for index in range(self.state.num_partitions)]

    def audit(self, step: int, shard: int, role: AuditRole, rank: int, digest: LeafDigest) -> list[Action]:
        """A trainer computed an audited shard. A digest of another step, and a repeat, change nothing."""
        if step != self.version or self._is_over:
            return []
        self.audits.take(shard, role, rank, digest)
        return self._settle_audit()

    def _settle_audit(self) -> list[Action]:
        """What follows when the audit of the open step has changed: another digest, a report, the votes that waited."""
        report = self.audits.settle(self.plan)
        found: list[Action] = list(self.audits.requests())
        if report is not None:
            found += [*self.report_progress(0.0, force=True), actions.Report(report)]
        if not self.audits.holds_step and not self._is_over:
            votes, self._audited_votes = self._audited_votes, {}
            for vote in votes.values():
                found += self.vote(vote)
        return found

    def take_summary(self, summary: Summary) -> None:
        """The open step's summary is complete; before this partition's own vote."""
        self.summaries = {step: s for step, s in self.summaries.items() if step >= self.version - 1}
        self.summaries[self.version] = summary

    def statistics(self, step: int, node: TreeNode, value: Statistics) -> list[Action]:
        """A node of the evaluation at `step`. A duplicate, or one of another evaluation, changes nothing."""
        if not self._takes_evaluation(step) or self.merged is not None or self._statistics is None:
            return []
        try:
            self._statistics.offer(node, Entry(value))
        except FrameError as error:
            self._is_over = True
            hint = "metrics() must give the same names and shapes for every batch"
            failure = Failure(error=detail_of(TaskError(error.cause, action=hint)), step=step)
            return [actions.Report(ProcessReport(failure=failure))]
        if not self._statistics.is_complete:
            return []
        self.merged = self._statistics.take_root().value
        return self.send_merged()

    def _takes_evaluation(self, step: int) -> bool:
        """Whether a part of the evaluation at `step` counts; also during a pause: no shard is computed twice."""
        is_open = self._evaluating == step == self.version and self.evaluated != step
        return is_open and self.activity in ("evaluate", "hold") and not self._is_over

    def send_merged(self) -> list[Action]:
        """Send the merged statistics, if there are any, to the trainer of shard 0, which finalises them."""
        if self.merged is None:
            return []
        ranks = frozenset(
            placement.rank
            for placement in self.plan.trainers
            if any(r.first <= 0 < r.first + r.count for r in placement.shards)
        )
        return [actions.SendMerged(self.version, ranks, pack_statistics(self.merged))]

    def outcome(self, step: int, outcome: Outcome) -> list[Action]:
        """The trainer of shard 0 finalised an evaluation, or digested the final values. Repeats change nothing."""
        if step != self.version or self._is_over:
            return []
        if outcome.metrics is not None:
            return self._evaluated(outcome.metrics) if self._takes_evaluation(step) else []
        if self.activity != "finish" or not outcome.sha256:
            return []
        self._is_over = True
        finished = Finished(
            generation=self.plan.generation,
            step=self.version,
            stopped=self.version < self.plan.final_step,
            parameters_sha256=outcome.sha256,
        )
        return [*self.report_progress(time.monotonic(), force=True), actions.Report(ProcessReport(finished=finished))]

    def every_second(self, now_s: float) -> list[Action]:
        """A second has passed. `now_s` is monotonic."""
        self.audits.expire(now_s, waits=len(self._audited_votes) == self.state.num_partitions)
        return [*self._settle_audit(), *self.report_progress(now_s)]

    def report_progress(self, now_s: float, *, force: bool = False) -> list[Action]:
        """Report the steps committed since the last report, at most once a second unless forced. `now_s` is monotonic:
        a wall clock that is set back would silence the job for as long."""
        due = now_s - self._reported_at >= REPORT_INTERVAL_S or len(self.records) >= MAX_RECORDS
        if not self.is_open and not (force and self.records):
            return []
        if not (force or (due and self._reported_step != self.version)):
            return []
        was_stopped = self.state.last is not None and self.state.last.kind == "stop"
        progress = Progress(
            generation=self.plan.generation,
            step=self.version - was_stopped,  # a step that is stopped at makes no version
            records=self.records,
            held=self.activity == "hold",
            audits=self.audits.take_records(),
        )
        self.records, self._reported_step, self._reported_at = [], self.version, now_s
        return [actions.Report(ProcessReport(progress=progress))]

    def _decide(self, votes: Mapping[int, Vote]) -> CommitDecision:
        return decide(votes, self.summaries[self.version], self.spec, self.plan)

    def _decided(self, decision: CommitDecision) -> list[Action]:
        if decision.kind == "stop":
            self._is_over = True
            up_to_it = Progress(generation=self.plan.generation, step=decision.step, records=self.records)
            failure = _non_finite(decision.step, self.summaries[decision.step])
            return [actions.Report(ProcessReport(progress=up_to_it)), actions.Report(ProcessReport(failure=failure))]
        self._record(decision)
        return self._choose_activity()

    def _record(self, decision: CommitDecision) -> None:
        self.records.append(step_record(self.spec, self.plan.final_step, decision, self.summaries[decision.step]))
        if decision.snapshot:
            self.saved = self.version
        self._audited_votes = {}
        self.audits.open_step(self.version, self.plan)

    def _choose_activity(self) -> list[Action]:
        """Choose what comes at the committed version, and send it to the trainers."""
        if self._is_over:
            return []
        activity = next_activity(
            self.version,
            self.spec,
            self.plan.final_step,
            evaluated=self.evaluated,
            saved=self.saved,
            stop=self.plan.stop and self.version > self.undecided,
            save=self.plan.save,
        )
        if activity == "evaluate" and self._evaluating != self.version:
            self._evaluating, self.merged = self.version, None
            tree = tree_of(self.spec.train.num_shards)
            self._statistics = Sums(tree, lambda left, right, _: add_statistics(left, right))
        self.activity = activity
        found: list[Action] = [actions.BroadcastDirective(self.directive)]
        if activity == "hold":
            # Before its snapshot's parts: the master moves upon both.
            found += self.report_progress(time.monotonic(), force=True)
        return found

    def _evaluated(self, metrics: Mapping[str, float]) -> list[Action]:
        self.evaluated, self.merged = self.version, None
        evaluation = Evaluation(self.version, metrics)
        return [
            *self.report_progress(time.monotonic(), force=True),
            actions.ReplicateEvaluation(evaluation),
            *self.report_evaluated(evaluation),
            *self._choose_activity(),
        ]

    def report_evaluated(self, evaluation: Evaluation) -> list[Action]:
        """Report an evaluation, also again after a takeover: the master drops one that it knows."""
        if not evaluation.metrics:
            return []
        metrics = dict(evaluation.metrics)
        report = Evaluated(generation=self.plan.generation, step=evaluation.step, metrics=metrics)
        return [actions.Report(ProcessReport(evaluated=report))]


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
    what = "the loss" if not np.isfinite(summary.loss_sum) else "a gradient, or a buffer that moved,"
    error = NonFiniteError(f"{what} is not finite in step {step + 1}", details={"step": str(step + 1)})
    return Failure(error=detail_of(error), step=step + 1)


def evaluates_at(version: int, spec: JobSpec, final_step: int) -> bool:
    """Whether the version is evaluated: every `evaluate.every_steps`, and at the end."""
    every = spec.evaluate.every_steps
    return version > 0 and (version == final_step or (every is not None and version % every == 0))


def snapshots_at(version: int, spec: JobSpec, final_step: int) -> bool:
    """Whether every partition writes the version: multiples of `durability.every_steps`, evaluations, the end."""
    return version % spec.durability.every_steps == 0 or evaluates_at(version, spec, final_step)


def next_activity(
    version: int, spec: JobSpec, final_step: int, *, evaluated: int, saved: int, stop: bool, save: bool = False
) -> Activity:
    """What comes at `version`; `evaluated` and `saved` are the newest evaluated and written ones. A stop and a rest
    (`save`) take effect at a version that is written; the decision on the next step sees to it that there is one."""
    if (stop or save) and saved == version and version < final_step:
        return "finish" if stop else "hold"
    if evaluates_at(version, spec, final_step) and evaluated != version:
        return "evaluate"
    return "finish" if version >= final_step else "train"


def decide(votes: Mapping[int, Vote], summary: Summary, spec: JobSpec, plan: Plan) -> CommitDecision:
    """The decision on a step from all its votes and its summary; the same wherever and whenever it is reached."""
    step = next(iter(votes.values())).step
    finite = all(vote.finite for vote in votes.values()) and math.isfinite(summary.loss_sum)
    norm = global_norm(votes, summary.weight) if finite else math.nan
    kind: DecisionKind = "commit" if finite else "skip" if spec.on_nonfinite == "skip" else "stop"
    scale = 1.0
    if finite:
        scale = clip_coefficient(norm, spec.train.clip_norm) / summary.weight if summary.weight > 0 else 0.0
    snapshot = kind != "stop" and (plan.stop or plan.save or snapshots_at(step + 1, spec, plan.final_step))
    return CommitDecision(
        generation=plan.generation, step=step, kind=kind, scale=scale, norm=norm, snapshot=snapshot, last=plan.stop
    )
