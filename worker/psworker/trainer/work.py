"""What a trainer is to do: a pure function of the plan, the coordinator's directive and what is done; and the agenda,
which holds plan and directive for the trainer's two threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from pscluster.step.audit import AuditRule, roles_of
from pscluster.step.tree import Statistics
from pscluster.v1.plan_pb2 import Plan, ProcessSpec
from pscluster.wire.frame import FrameKind, Header, job_number
from pscluster.wire.protocol import Channel, Directive, Hello

WorkKey = tuple[int, int, int, str]  # restore_generation, version, moved_generation, action
NEVER_AUDITED = AuditRule()
Done = Mapping[WorkKey, Set[int]]  # shards that were computed, by what they were computed for


@dataclass(frozen=True, kw_only=True)
class Work:
    """`shards`: this trainer's that are not done yet for this key.

    `restore_generation`: generation of the newest restore; `version`: of the parameters that the step starts from.
    `moved_generation`: generation of the newest takeover of any partition (for "train"), or of the coordinator. Where a
    standby has taken over, what its partition had collected of the open step is gone, and the work is done again; the
    other partitions drop it as a duplicate. `action`: "initialise" (give the first values to `shards`, here
    partitions), "train", "evaluate", "finalise" (turn `statistics` into metrics), "finish" (digest the final values),
    "audit", "arbitrate" (compute one shard for its digest alone)."""

    restore_generation: int
    generation: int
    version: int
    action: str
    moved_generation: int = 0
    shards: tuple[int, ...] = ()
    statistics: Statistics | None = None

    @property
    def is_step(self) -> bool:
        """Whether it computes gradients at the values that trainers get, which may be rounded."""
        return self.action in ("train", "audit", "arbitrate")

    @property
    def key(self) -> WorkKey:
        return (self.restore_generation, self.version, self.moved_generation, self.action)


def shards_of(plan: Plan, rank: int) -> list[int]:
    """The shards that a plan assigns to a trainer, lowest first: a left sibling is added to while its right one comes,
    never the other way round, when autograd may still hold it."""
    runs = [run for placement in plan.trainers if placement.rank == rank for run in placement.shards]
    return sorted(shard for run in runs for shard in range(run.first, run.first + run.count))


def find_work(
    plan: Plan,
    directive: Directive | None,
    merged: tuple[int, Statistics] | None,
    empty_partitions: Set[int],
    rank: int,
    done: Done,
    audits: AuditRule = NEVER_AUDITED,
    arbitration: tuple[int, int] | None = None,
) -> Work | None:
    """What is left to do, or None.

    `merged`: version and root of a complete evaluation; `empty_partitions` hold no values yet. `arbitration`: version
    and shard of the digest that the coordinator asks for. An audit comes before the step's own shards: the coordinator
    has its digest by the time that the step can be complete."""
    mine = shards_of(plan, rank)
    base = Work(restore_generation=plan.restore_generation, generation=plan.generation, version=0, action="")
    if directive is None:
        first = min((placement.rank for placement in plan.trainers if placement.active), default=-1)
        may = empty_partitions and plan.resume_step == 0 and first == rank
        return _left(replace(base, action="initialise"), [min(empty_partitions)] if may else [], done)
    if directive.action == "hold":
        return None  # the job pauses at this version, to continue elsewhere
    moved = plan.moved_generation if directive.action == "train" else plan.coordinator_generation
    base = replace(base, version=directive.version, action=directive.action, moved_generation=moved)
    if directive.action == "finish":
        return _left(base, [0] if 0 in mine else [], done)
    if directive.action == "train" and (audit := _find_audit(plan, base, audits, rank, done)):
        return audit
    found = _left(base, mine, done)
    if found is None and arbitration is not None and (arbitration[0], "train") == (directive.version, directive.action):
        return _left(_for_digest(base, "arbitrate", plan), [arbitration[1]], done)
    if found is None and directive.action == "evaluate" and merged is not None and merged[0] == directive.version:
        return _left(replace(base, action="finalise", statistics=merged[1]), [0] if 0 in mine else [], done)
    return found


def _find_audit(plan: Plan, base: Work, audits: AuditRule, rank: int, done: Done) -> Work | None:
    """The shard that this trainer computes a second time, if that is still to be done."""
    shard = audits.shard_of(base.version)
    roles = roles_of(plan, shard) if shard is not None else None
    if shard is None or roles is None or roles.auditor.rank != rank:
        return None
    return _left(_for_digest(base, "audit", plan), [shard], done)


def _for_digest(base: Work, action: str, plan: Plan) -> Work:
    """A digest goes to the coordinator alone: it is done again only when another process takes that over."""
    return replace(base, action=action, moved_generation=plan.coordinator_generation)


def _left(work: Work, shards: Sequence[int], done: Done) -> Work | None:
    left = tuple(shard for shard in shards if shard not in done.get(work.key, ()))
    return replace(work, shards=left) if left else None


class Agenda:
    """This trainer's identity, plan, directive and finished evaluation.

    The reactor's thread writes, the main thread reads; both hold `changed`, which every write notifies."""

    def __init__(self, start: ProcessSpec, audits: AuditRule = NEVER_AUDITED) -> None:
        self.changed = threading.Condition()
        self.job_id = start.job_id
        self.job = job_number(start.job_id)
        self.rank = start.rank
        self.plan: Plan | None = None
        self.directive: Directive | None = None
        self.merged: tuple[int, Statistics] | None = None
        self.arbitration: tuple[int, int] | None = None  # version and shard of the digest that is asked for
        self.audits = audits
        self.empty_partitions: set[int] = set()  # that hold no values yet
        self._attempt = start.attempt
        self._cluster_id = start.cluster_id
        self._early: Directive | None = None  # of a generation whose plan is not here yet
        self._closed = False
        self._error: BaseException | None = None

    @property
    def restore_generation(self) -> int:
        """Of the plan in force; 0: there is none."""
        return self.plan.restore_generation if self.plan is not None else 0

    # ---- the main thread ----

    def next_work(self, done: Done) -> Work | None:
        """Block until there is something to do that is not in `done`; None: the agent ends this process.

        Raises what ended the reactor's thread."""
        with self.changed:
            while not self._is_closed():
                work = self.find_work(done)
                if work is not None:
                    return work
                self.changed.wait()
        return None

    def find_work(self, done: Done) -> Work | None:
        """What is to be done now."""
        if self.plan is None:
            return None
        return find_work(
            self.plan, self.directive, self.merged, self.empty_partitions, self.rank, done,
            self.audits, self.arbitration,
        )  # fmt: skip

    def is_current(self, work: Work) -> bool:
        """Whether the plan and the directive still ask for this work."""
        with self.changed:
            plan, directive = self.plan, self.directive
            return (
                not self._closed
                and plan is not None
                and directive is not None
                and plan.generation == work.generation
                and (directive.version, directive.action) == (work.version, work.action)
            )

    def may_continue(self, work: Work) -> bool:
        """Whether values for this work can still come: nothing was restored since. Under `changed`.

        Raises what ended the reactor's thread."""
        return not self._is_closed() and self.restore_generation == work.restore_generation

    def take_empty_partitions(self) -> list[int]:
        """The partitions that hold no values, which the caller is about to send."""
        with self.changed:
            empty, self.empty_partitions = sorted(self.empty_partitions), set()
        return empty

    # ---- the reactor's thread ----

    def adopt(self, plan: Plan) -> Directive | None:
        """A newer plan is in force; returns the directive that arrived before it."""
        with self.changed:
            held, self.plan = self.plan, plan
            restored = held is None or plan.restore_generation != held.restore_generation
            if restored:
                self.empty_partitions = set()
            if restored or (held is not None and plan.coordinator_generation != held.coordinator_generation):
                self.directive, self.merged, self.arbitration = None, None, None  # of a coordinator that is gone
            early, self._early = self._early, None
            self.changed.notify_all()
        return early

    def direct(self, directive: Directive) -> bool:
        """Follow a directive; False: it is of an older plan, or of one that is not here yet and is kept until then."""
        with self.changed:
            plan = self.plan
            if plan is None or directive.generation > plan.generation:
                self._early = directive
                return False
            if directive.generation < plan.restore_generation:
                return False
            self.directive = directive
            self.empty_partitions = set()  # the coordinator directs once every partition has its first values
            self.changed.notify_all()
        return True

    def merge(self, version: int, statistics: Statistics) -> None:
        """The evaluation of `version` is complete."""
        with self.changed:
            self.merged = (version, statistics)
            self.changed.notify_all()

    def arbitrate(self, generation: int, version: int, shard: int) -> None:
        """The coordinator asks for the digest of a shard of the step that starts from `version`."""
        with self.changed:
            if generation >= self.restore_generation:
                self.arbitration = (version, shard)
                self.changed.notify_all()

    def welcomed(self, partition: int, *, needs_values: bool) -> None:
        """A partition accepts PULLs."""
        with self.changed:
            if needs_values:
                self.empty_partitions.add(partition)
            self.changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """There is no more work; `error`: raised on the main thread."""
        with self.changed:
            self._closed, self._error = True, self._error or error
            self.changed.notify_all()

    def header(self, kind: FrameKind, *, step: int = 0, flags: int = 0) -> Header:
        """A header of this trainer under the plan in force."""
        assert self.plan is not None
        return Header(
            kind=kind, job=self.job, generation=self.plan.generation, step=step, flags=flags, sender=self.rank
        )

    def make_hello(self, channel: Channel, *, share: bool, num_lanes: int) -> tuple[Header, Hello]:
        """What opens a connection to a partition."""
        assert self.plan is not None
        hello = Hello(
            token=self.plan.data_token.hex(),
            role="trainer",
            channel=channel,
            attempt=self._attempt,
            restore_generation=self.plan.restore_generation,
            share=share,
            num_lanes=num_lanes,
            cluster=self._cluster_id,
        )
        return self.header(FrameKind.HELLO), hello

    def _is_closed(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._closed
