"""Audits: which shard of a step is computed twice, and by whom. Pure functions; imports no torch.

Trainers and the coordinator call them with the same arguments, so nobody has to be told."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from typing import NamedTuple

from pscluster.v1.plan_pb2 import Plan, TrainerPlacement


class AuditRole(IntEnum):
    """Who computed the shard of an audit."""

    OWNER = 0  # the trainer to which the plan assigns the shard; its gradient counts
    AUDITOR = 1  # the second one, for the digest alone
    ARBITER = 2  # the third one, where the first two differ


class Participant(NamedTuple):
    """The very process that has a role."""

    rank: int
    attempt: int
    node_id: str

    @property
    def name(self) -> str:
        return f"trainer-{self.rank}" + (f" on {self.node_id}" if self.node_id else "")


class Roles(NamedTuple):
    """`auditor` is the owner itself where the plan has no other trainer of its numerics class."""

    owner: Participant
    auditor: Participant
    arbiter: Participant | None


@dataclass(frozen=True, kw_only=True)
class AuditRule:
    """How a job chooses what to audit. `share`: of the steps."""

    seed: int = 0
    share: float = 0.0
    num_shards: int = 1

    def shard_of(self, step: int) -> int | None:
        """The audited shard of the step that starts from version `step`; None: the step is not audited."""
        return audited_shard(self.seed, step, self.share, self.num_shards) if self.share else None


def audited_shard(seed: int, step: int, share: float, num_shards: int) -> int | None:
    """The shard of the step that is computed twice, each as likely as the others; None in all but `share` of steps.

    Both are drawn from one blake2b digest of (seed, step)."""
    digest = blake2b(struct.pack("<Qq", seed, step), digest_size=16, person=b"ps-audit").digest()
    chance, choice = struct.unpack("<QQ", digest)
    return (choice * num_shards) >> 64 if chance < share * 2.0**64 else None


def roles_of(plan: Plan, shard: int) -> Roles | None:
    """Who computes the audit of a shard under a plan; None: nobody has the shard.

    The auditor is the next trainer after the owner, in the plan's order, that has shards and is of the same numerics
    class; the arbiter the next of the class after that."""
    active = [trainer for trainer in plan.trainers if trainer.active]
    at = next((place for place, trainer in enumerate(active) if _owns(trainer, shard)), None)
    if at is None:
        return None
    owner = active[at]
    alike = [t for t in (*active[at + 1 :], *active[:at]) if t.numerics_class == owner.numerics_class]
    auditor = next((t for t in alike if t.shards), owner)
    arbiter = next((t for t in alike if t.rank != auditor.rank), None)
    return Roles(
        participant_of(owner), participant_of(auditor), participant_of(arbiter) if arbiter is not None else None
    )


def _owns(trainer: TrainerPlacement, shard: int) -> bool:
    return any(run.first <= shard < run.first + run.count for run in trainer.shards)


def participant_of(trainer: TrainerPlacement) -> Participant:
    """The process of a placement, as audits name it."""
    return Participant(trainer.rank, trainer.attempt, trainer.node_id)
