"""Decisions that are wrong: planted in place of the real ones, to see that a check finds them."""

from __future__ import annotations

from dataclasses import replace

from psserver.partition.replication import in_sync
from psserver.partition.replication.in_sync import InSyncState
from psserver.partition.step import voting
from psserver.partition.step.voting import CommitDecision, CoordinatorState, Decide, Member, Vote

_RECEIVE_VOTE, _ACKNOWLEDGE = voting.receive_vote, in_sync.acknowledge


def forgets_decisions(
    coordinator: CoordinatorState, vote: Vote, decide: Decide
) -> tuple[CoordinatorState, CommitDecision | None, bool]:
    """For `voting.receive_vote`: the decision on the step before is not repeated."""
    after, decision, to_all = _RECEIVE_VOTE(coordinator, vote, decide)
    return after, decision if to_all else None, to_all


def keeps_its_old_vote(member: Member, generation: int) -> Member:
    """For `voting.member_adopts`: the vote keeps its generation."""
    return replace(member, generation=generation)


def reports_at_once(held: InSyncState, acked_version: int, _promised: int) -> tuple[InSyncState, bool]:
    """For `in_sync.acknowledge`: the pair is reported in sync although votes may be ahead of the standby."""
    acked = max(acked_version, held.acked_version)
    return replace(held, acked_version=acked, ack_required=True, reported_in_sync=True), not held.reported_in_sync


def never_requires_acks(held: InSyncState, acked_version: int, promised: int) -> tuple[InSyncState, bool]:
    """For `in_sync.acknowledge`: votes never wait for the standby."""
    after, reports = _ACKNOWLEDGE(held, acked_version, promised)
    return replace(after, ack_required=False), reports


def keeps_former_acks(held: InSyncState, attempt: int, *, restored: bool) -> InSyncState:  # noqa: ARG001
    """For `in_sync.adopt`: what another standby acknowledged counts for the new one."""
    return replace(held, attempt=attempt)
