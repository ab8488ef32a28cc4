"""What a partition's parts ask for: frozen values that `PartitionService` carries out, in order, in its one loop.

An action's own consequences are carried out before the action that follows it in the list."""

from __future__ import annotations

from dataclasses import dataclass

from pscluster.v1.plan_pb2 import ProcessReport
from pscluster.wire.partition_protocol import CommitDecision, Evaluation, Metadata, Vote
from pscluster.wire.protocol import Directive

# ---- the step ----


@dataclass(frozen=True)
class TryVote:
    """Something that a vote waits for has changed: a sum, or the standby."""


@dataclass(frozen=True)
class SendVote:
    """Send the vote on the open step to the coordinator. Sending it again is harmless."""

    vote: Vote


@dataclass(frozen=True)
class SendHeld:
    """A standby: acknowledge to the primary what is held. Sending it again is harmless."""


@dataclass(frozen=True)
class ReplicateDecision:
    """A decision is about to be carried out; the step's sums are still intact."""

    decision: CommitDecision


@dataclass(frozen=True)
class OpenNextStep:
    """Turn the sums of the decided step into updates, and begin the next step empty."""

    decision: CommitDecision


@dataclass(frozen=True)
class ApplyBucket:
    """Run the optimizer over one bucket: its values change."""

    bucket: int


@dataclass(frozen=True)
class ServePulls:
    """Send trainers every requested bucket that is new enough."""


@dataclass(frozen=True)
class WriteSnapshot:
    """Write the newest version in the background; `last`: the job may end with it."""

    last: bool = False


@dataclass(frozen=True)
class SyncStandby:
    """The state is that of a step: send it to a standby that waits for it."""


@dataclass(frozen=True)
class ResumeReading:
    """A standby: the update is done, the primary's next decision may be read."""


@dataclass(frozen=True)
class ReplayEarly:
    """Handle the frames of this step that arrived during the step before."""


@dataclass(frozen=True)
class JoinJob:
    """Every value is here: take part in the job."""


# ---- the coordinator ----


@dataclass(frozen=True)
class SendDecision:
    """Send a decision to one partition."""

    partition: int
    decision: CommitDecision


@dataclass(frozen=True)
class RequestVote:
    """Ask a partition for its vote on `step`."""

    partition: int
    step: int


@dataclass(frozen=True)
class BroadcastDirective:
    """Send every trainer what comes next."""

    directive: Directive


@dataclass(frozen=True)
class SendMerged:
    """Send the merged statistics of the evaluation at `step` to the trainers of these ranks, to be finalised."""

    step: int
    ranks: frozenset[int]
    body: bytes


@dataclass(frozen=True)
class RequestDigest:
    """Ask the trainer of this rank for the digest of a shard of the open step. Sending it again is harmless."""

    rank: int
    step: int
    shard: int


@dataclass(frozen=True)
class ReplicateEvaluation:
    """An evaluation is finalised: the standby gets it before the next step."""

    evaluation: Evaluation


# ---- reports ----


@dataclass(frozen=True)
class Report:
    """Send a report to the master, by way of the agent."""

    report: ProcessReport


@dataclass(frozen=True)
class ReportSteps:
    """The coordinator: report every committed step that is not reported yet."""


# ---- a standby ----


@dataclass(frozen=True)
class BeginAt:
    """Drop every sum and vote: the state is, or will be, that of `step`, which `last_decision` made."""

    step: int
    last_decision: CommitDecision | None
    metadata: Metadata


@dataclass(frozen=True)
class AdoptMetadata:
    """The primary's metadata has changed."""

    metadata: Metadata


Action = (
    TryVote
    | SendVote
    | SendHeld
    | ReplicateDecision
    | OpenNextStep
    | ApplyBucket
    | ServePulls
    | WriteSnapshot
    | SyncStandby
    | ResumeReading
    | ReplayEarly
    | JoinJob
    | SendDecision
    | RequestVote
    | BroadcastDirective
    | SendMerged
    | RequestDigest
    | ReplicateEvaluation
    | Report
    | ReportSteps
    | BeginAt
    | AdoptMetadata
)
