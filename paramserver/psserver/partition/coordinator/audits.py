"""The audit of the open step: digests in, result out. Pure; see `pscluster.step.audit` for who computes what.

A step is not decided while its audit is pending, so its values are still there for a third trainer when two digests
differ. Usually nothing waits for that: both trainers send their digest before the summary without which the step is
not complete. A plan that gives a role to another process has that one compute the shard again. An audit ends as
unfinished when digests do not arrive within MAX_WAIT_S."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pscluster.agent.status import detail_of
from pscluster.errors import AuditError
from pscluster.job.spec import JobSpec
from pscluster.step.audit import AuditRole, AuditRule, Participant, Roles, participant_of, roles_of
from pscluster.step.layout import Layout
from pscluster.v1.plan_pb2 import AuditMismatch, AuditRecord, Plan, ProcessReport
from pscluster.v1.plan_pb2 import Warning as WarningReport
from pscluster.wire.protocol import LeafDigest
from psserver.partition.actions import RequestDigest

MAX_WAIT_S = 60.0  # for digests, once a step is complete but for them; a lost trainer ends the wait before, by a plan
MAX_RECORDS = 10_000  # of audits whose report is pending

Cause = Literal["node", "either", "alone", "code"]


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Two digests of a shard differ. `first`: the first tensor that does, or "weight" or "loss".

    `cause`: "node", two agree against the one named; "either", of two nothing tells which; "alone", one trainer differs
    from itself; "code", three differ. `named`: the trainers that may be at fault."""

    step: int
    shard: int
    first: int | str
    cause: Cause
    named: tuple[Participant, ...]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A pending audit of the step that starts from version `step`.

    `received`: the first digest of each trainer in each role, under whichever plan it came: a trainer computes nothing
    twice for a later plan that gives a role back to it."""

    step: int
    shard: int
    roles: Roles
    received: Mapping[tuple[AuditRole, Participant], LeafDigest] = field(default_factory=dict)

    @property
    def digests(self) -> Mapping[AuditRole, LeafDigest]:
        """Those of the trainers that have the roles now."""
        owned = ((role, who, self.roles[role]) for role, who in self.received)
        return {role: self.received[role, who] for role, who, expected in owned if who == expected}

    @property
    def needs_arbiter(self) -> bool:
        """Two digests differ, and a third trainer can tell which is wrong."""
        return self.difference is not None and self.roles.arbiter is not None and AuditRole.ARBITER not in self.digests

    @property
    def is_complete(self) -> bool:
        return {AuditRole.OWNER, AuditRole.AUDITOR} <= self.digests.keys() and not self.needs_arbiter

    @property
    def difference(self) -> int | str | None:
        """Where the first two digests differ; None: nowhere, or one is missing."""
        owner, auditor = (self.digests.get(role) for role in (AuditRole.OWNER, AuditRole.AUDITOR))
        return owner.first_difference(auditor) if owner is not None and auditor is not None else None


def take(audit: Audit, role: AuditRole, sender: Participant, digest: LeafDigest) -> Audit:
    """A digest arrived. A repeat changes nothing."""
    return replace(audit, received={(role, sender): digest, **audit.received})


def adopt(audit: Audit, plan: Plan, *, follows: bool) -> Audit:
    """The audit under a new plan. Who has a role again does not compute the shard again: its digest counts. So does
    that of a former owner, whose gradient is the one that the sums have; unless the plan does not follow the last one
    known here, so that a third trainer may have been the owner meanwhile."""
    roles = roles_of(plan, audit.shard)
    if roles is None:  # nobody computes now; the next plan may name somebody
        return audit
    received = audit.received
    if not follows:
        stays = {audit.roles.owner} & {roles.owner}
        received = {key: found for key, found in received.items() if key[0] is not AuditRole.OWNER or key[1] in stays}
    elif AuditRole.OWNER in audit.digests and audit.roles.owner not in (roles.owner, roles.auditor):
        third = next(
            (one for one in (roles.owner, roles.arbiter) if one not in (audit.roles.owner, roles.auditor)), None
        )
        roles = Roles(audit.roles.owner, roles.auditor, third)
    return replace(audit, roles=roles, received=received)


def judge(audit: Audit) -> Mismatch | None:
    """What an audit whose first two digests are there has found; None: they are the same."""
    first = audit.difference
    if first is None:
        return None
    owner, auditor, _ = audit.roles
    third = audit.digests.get(AuditRole.ARBITER)
    agrees = [
        role
        for role in (AuditRole.OWNER, AuditRole.AUDITOR)
        if third is not None and audit.digests[role].first_difference(third) is None
    ]
    cause: Cause
    named: tuple[Participant, ...]
    if agrees:
        cause, named = "node", (auditor if agrees == [AuditRole.OWNER] else owner,)
    elif third is not None:
        cause, named = "code", tuple(role for role in audit.roles if role is not None)
    elif owner == auditor:
        cause, named = "alone", (owner,)
    else:
        cause, named = "either", (owner, auditor)
    if cause == "node" and owner == auditor:
        cause = "alone"
    return Mismatch(step=audit.step, shard=audit.shard, first=first, cause=cause, named=named)


class OpenAudit:
    """The audit of the coordinator's open step, and what is to be reported of those before.

    `pending`: None when the open step is not audited, its audit has ended, or no trainer has had the shard yet.
    `is_rejected`: a mismatch was found for which the step is never committed; a plan with a restore follows, or the
    job's end."""

    def __init__(self, spec: JobSpec) -> None:
        self.pending: Audit | None = None
        self.is_rejected = False
        self.records: list[AuditRecord] = []
        self._rule = AuditRule(seed=spec.train.seed, share=spec.audit.share, num_shards=spec.train.num_shards)
        self._on_mismatch = spec.audit.on_mismatch
        self._due: tuple[int, int] | None = None  # step and shard of the audit that has not ended
        self._generation = 0
        self._trainers: dict[int, Participant] = {}  # of the newest plan, by rank
        self._waits_since_s: float | None = None

    @property
    def holds_step(self) -> bool:
        """Whether the open step must not be decided now."""
        return self._due is not None or self.is_rejected

    def open_step(self, step: int, plan: Plan) -> None:
        """The step that starts from version `step` is open under this plan; nothing of the one before is pending."""
        self._end("unfinished")
        shard = self._rule.shard_of(step) if step < plan.final_step else None
        self._due = (step, shard) if shard is not None else None
        self.adopt(plan)

    def adopt(self, plan: Plan) -> None:
        """A new plan without a restore: the audit goes on with whom it names."""
        follows, self._generation = plan.generation == self._generation + 1, plan.generation
        self._waits_since_s = None
        self._trainers = {trainer.rank: participant_of(trainer) for trainer in plan.trainers}
        if self.pending is not None:
            self.pending = adopt(self.pending, plan, follows=follows)
        elif self._due is not None and (roles := roles_of(plan, self._due[1])) is not None:
            self.pending = Audit(step=self._due[0], shard=self._due[1], roles=roles)

    def take(self, shard: int, role: AuditRole, rank: int, digest: LeafDigest) -> None:
        """A digest of a shard of the open step arrived."""
        if self.pending is not None and self.pending.shard == shard and rank in self._trainers:
            self.pending = take(self.pending, role, self._trainers[rank], digest)

    def expire(self, now_s: float, *, waits: bool) -> None:
        """Time has passed; `waits`: the step is complete but for its audit. Gives up who has not answered in time."""
        if self._due is None or not waits:
            return
        if self._waits_since_s is None:
            self._waits_since_s = now_s
        if now_s - self._waits_since_s < MAX_WAIT_S:
            return
        if self.pending is not None and self.pending.needs_arbiter:
            self.pending = replace(self.pending, roles=self.pending.roles._replace(arbiter=None))
        else:
            self._end("unfinished")

    def requests(self) -> list[RequestDigest]:
        """What to ask the third trainer, where two differ. Repeating it is harmless."""
        audit = self.pending
        if audit is None or not audit.needs_arbiter or audit.roles.arbiter is None:
            return []
        return [RequestDigest(audit.roles.arbiter.rank, audit.step, audit.shard)]

    def settle(self, plan: Plan) -> ProcessReport | None:
        """End the pending audit if it is complete; what to report at once of a mismatch."""
        if self.pending is None or not self.pending.is_complete:
            return None
        mismatch = judge(self.pending)
        self._end("equal" if mismatch is None else "differing")
        if mismatch is None:
            return None
        error, step = detail_of(error_of(mismatch, plan)), mismatch.step + 1
        wanted = self._on_mismatch or ("warn" if plan.mixed else "stop")
        if wanted == "warn":
            return ProcessReport(warning=WarningReport(error=error, step=step))
        self.is_rejected = True
        node_id = mismatch.named[0].node_id if wanted == "exclude" and mismatch.cause == "node" else ""
        report = AuditMismatch(generation=plan.generation, step=step, node_id=node_id, error=error)
        return ProcessReport(audit_mismatch=report)

    def take_records(self) -> list[AuditRecord]:
        """The audits that ended since the last call; the caller reports them."""
        records, self.records = self.records, []
        return records

    def _end(self, result: Literal["equal", "differing", "unfinished"]) -> None:
        due, self._due = self._due, None
        audit, self.pending = self.pending, None
        if due is None:
            return
        roles = audit.roles[:2] if audit is not None else ()
        nodes = list(dict.fromkeys(role.node_id for role in roles))
        self.records.append(AuditRecord(step=due[0] + 1, result=result, nodes=nodes))
        del self.records[:-MAX_RECORDS]


_CAUSES: Mapping[Cause, str] = {
    "node": "{0} gave other bits than two other trainers, which agree",
    "either": "{0} and {1} gave different bits, and there is no third trainer to tell which of them is wrong",
    "alone": "{0} gave different bits when it computed the same microbatch again",
    "code": "{0}, {1} and {2} gave three different results",
}
_ACTIONS: Mapping[Cause, str] = {
    "node": "test that machine's memory and processor, and drain it",
    "either": "test both machines; a third worker tells which of them is wrong",
    "alone": "make the task's code a function of its batch and of seeded draws; if it is, test the machine",
    "code": "make the task's code a function of its batch and of seeded draws: something else has entered the result",
}


def error_of(mismatch: Mismatch, plan: Plan) -> AuditError:
    """The named error of a mismatch. Steps count from 1, as people see them."""
    names = [participant.name for participant in mismatch.named]
    where = str(mismatch.first)
    details = {"step": str(mismatch.step + 1), "shard": str(mismatch.shard), "kind": mismatch.cause}
    if isinstance(mismatch.first, int):
        tensor, bucket = _place(plan, mismatch.first)
        where = f"the gradient of {tensor}, bucket {bucket}"
        details |= {"tensor": tensor, "bucket": str(bucket)}
    details |= {"trainers": ", ".join(names), "nodes": ", ".join(dict.fromkeys(p.node_id for p in mismatch.named))}
    cause = f"audit of step {mismatch.step + 1}, shard {mismatch.shard}: {_CAUSES[mismatch.cause].format(*names)}"
    return AuditError(f"{cause}; the first difference is in {where}", action=_ACTIONS[mismatch.cause], details=details)


def _place(plan: Plan, tensor: int) -> tuple[str, int]:
    """Name and bucket of a tensor of the layout."""
    layout = Layout.from_json(plan.layout_json)
    if tensor not in layout.bucket_of:
        return f"tensor {tensor}", -1
    return layout.tensors[tensor].name, layout.bucket_of[tensor][0]
