"""What the audits of a job have found: counts, and how far they vouch for each node. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditRecord:
    """The end of the audit of one step: "equal", "differing" or "unfinished". `nodes`: whose trainers computed it."""

    step: int
    result: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class VouchedNode:
    """The newest step in which a node's trainer computed the same as another; `alone`: as itself, a second time."""

    node_id: str
    step: int
    alone: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Audits:
    """Counts by result, of all audits ever made of the job. `step`: of the newest that counts."""

    equal: int = 0
    differing: int = 0
    unfinished: int = 0
    vouched: tuple[VouchedNode, ...] = ()
    step: int = 0

    def plus(self, records: Iterable[AuditRecord]) -> Audits:
        """With these records, in order. A repeated one changes nothing."""
        found = self
        for record in records:
            if record.step > found.step:
                found = found._plus_one(record)
        return found

    def after_rollback(self, step: int) -> Audits:
        """After the job went back to `step`: nothing is vouched for beyond it."""
        vouched = tuple(replace(own, step=min(own.step, step)) for own in self.vouched)
        return replace(self, step=min(self.step, step), vouched=vouched)

    def _plus_one(self, record: AuditRecord) -> Audits:
        counted = replace(
            self,
            step=record.step,
            equal=self.equal + (record.result == "equal"),
            differing=self.differing + (record.result == "differing"),
            unfinished=self.unfinished + (record.result == "unfinished"),
        )
        if record.result != "equal":
            return counted
        by_node = {own.node_id: own for own in self.vouched}
        alone = len(record.nodes) == 1
        by_node |= {node: VouchedNode(node_id=node, step=record.step, alone=alone) for node in record.nodes}
        return replace(counted, vouched=tuple(by_node[node] for node in sorted(by_node)))


NO_AUDITS = Audits()
