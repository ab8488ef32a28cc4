"""A master without I/O: transactions on a virtual clock, agents that are values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pscluster.errors import PsError
from pscluster.job.spec import JobSpec, parse_spec
from psmaster.control.transaction import Report, Transaction
from psmaster.model.audits import Audits, VouchedNode
from psmaster.model.job import (
    AuditMismatch,
    Best,
    Condition,
    DataConnection,
    ErrorInfo,
    Event,
    Finished,
    Instant,
    Job,
    JobState,
    JobWarning,
    PreflightCheck,
    StepRecord,
)
from psmaster.model.membership import Node, Role
from psmaster.model.plan import Part, Placement, Plan, ProcessKind, RestorePoint
from psmaster.model.process import Exit, Failure, PartitionFacts, Process, TrainerFacts, Unreached
from psmaster.model.reports import Progress, StandbyState
from psmaster.model.state import Changes, State
from psmaster.scheduling.draft import Limits
from psmaster.scheduling.reconcile import Desired, desired
from tests.harness.driven_loop import DrivenLoop, drive
from tests.harness.memory_store import MemoryArchive, MemoryStore

LIMITS = Limits()


def make_spec(**changes: Any) -> JobSpec:
    """A valid spec of 8 shards; `workers`, `servers`, `train`, ... replace keys of those sections."""
    data: dict[str, Any] = {
        "name": "job",
        "task": {"entrypoint": "some.module:Task"},
        "train": {"global_batch": 16, "microbatch": 2, "max_steps": 100},
        "workers": {"min": 1, "max": 4},
        "servers": {"partitions": 2},
        "durability": {"every_steps": 10},
    }
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_spec(data)


def make_job(job_id: str = "job-aaaaaa", created_s: float = 1.0, **changes: Any) -> Job:
    """A queued job; `changes` go to its spec."""
    spec = make_spec(**changes)
    return Job(
        job_id=job_id,
        name=spec.name,
        spec=spec,
        created_s=created_s,
        request_id=f"request of {job_id}",
        store=f"/store/{job_id}",
        data_token=b"token",
    )


def full_job() -> Job:
    """A running job with something other than the default in every field that is stored, nested ones included."""
    trainer = Placement(
        kind=ProcessKind.TRAINER,
        rank=1,
        attempt=2,
        node_id="w",
        incarnation="i",
        last_node_id="w0",
        active=True,
        suspect=True,
        shards=((1, 3), (5, 2)),
        device="cuda:0",
        numerics_class="N",
        losses=2,
        failed_on=("w8",),
        not_before_s=3.5,
    )
    partition = replace(trainer, kind=ProcessKind.PARTITION, shards=(), device="", addresses=("unix:/x", "tcp:h:1"))
    standby = replace(partition, node_id="s2", standby=True, synced=True, attempt=3)
    error = ErrorInfo(code="PS-2001", cause="c", action="a", details=(("k", "v"),))
    vouched = VouchedNode(node_id="w", step=29, alone=True)
    return Job(
        job_id="job-aaaaaa",
        name="job",
        spec=make_spec(),
        created_s=1.0,
        request_id="r",
        bundle_sha256="ab",
        data_token=b"token",
        owner="alice",
        store="/store",
        directory="/directory",
        state=JobState.RUNNING,
        reason="trains",
        started_s=2.0,
        ended_s=3.0,
        stopping=True,
        trainers=(trainer,),
        partitions=(partition,),
        standbys=(standby,),
        attempts=(("trainer-0", 2),),
        excluded=(("w9", "i9", "why"),),
        generation=7,
        plan=_full_plan(trainer, partition, standby),
        layout_json=b"\x00layout",
        layout_sha256="L",
        data_fingerprint="D",
        microbatch_digest="M",
        numerics_mode="mixed",
        numerics_class="N",
        optimizer_class="O",
        numerics="strict: same bits",
        final_step=100,
        step=30,
        high_step=31,
        loss=float("inf"),
        grad_norm=0.5,
        nonfinite=1,
        metrics=(("loss", 0.25),),
        metrics_step=20,
        best=Best(step=10, value=0.5),
        next_best=Best(step=20, value=0.4),
        finished=Finished(generation=7, step=100, stopped=True, parameters_sha256="f"),
        crashes=(("train", 4, 1),),
        snapshot_warning=JobWarning(step=5, error=error),
        error=error,
        traceback="Traceback",
        saving=True,
        held=20,
        audits=Audits(equal=3, differing=1, unfinished=2, vouched=(vouched,), step=30),
        mismatch=AuditMismatch(generation=7, step=31, node_id="w", error=error),
        going_back=True,
        parameters_sha256="f00d",
        checks=(PreflightCheck(name="n", ok=True, detail="d", node_id="w", warning=True),),
        connections=(DataConnection(trainer=1, partition=2, transport="unix"),),
        conditions=(Condition(type="Ready", status=True, reason="R", message="m", since_s=1.0),),
        revision=17,
    )


def _full_plan(trainer: Placement, partition: Placement, standby: Placement) -> Plan:
    part = Part(step=10, partition=1, generation=2, path="p", size_bytes=7, checksum="crc32c:1", nodes=("s", "s2"))
    return Plan(
        generation=7,
        trainers=(trainer,),
        partitions=(partition,),
        standbys=(standby,),
        restore_generation=2,
        resume_step=10,
        restore=RestorePoint(step=10, parts=(part,)),
        stop=True,
        save=True,
        kept_steps=(10, 20),
        final_step=100,
        moved_generation=5,
        coordinator_generation=4,
    )


def make_record(step: int, **changes: Any) -> StepRecord:
    """A plain committed step."""
    values: dict[str, Any] = {
        "step": step,
        "loss": 1.0 / step,
        "grad_norm": 0.5,
        "lr": 0.1,
        "weight": 64.0,
        "samples": 16.0,
        "skipped": False,
        "time_s": 1000.0 + step,
    }
    return StepRecord(**{**values, **changes})


TRAINER = TrainerFacts(
    layout_json=b'{"buckets":[1,2]}', layout_sha256="L", data_fingerprint="D", numerics_class="N" * 16, final_step=100
)
PARTITION = PartitionFacts(addresses=("unix:/x",), numerics_class="O" * 16)


class World:
    """One master over time: the product's loop on a clock of the test's. Every transaction is written to a store, so
    that `restart` can read it again."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.store = MemoryStore()
        self.archive = MemoryArchive(self.store)
        self.now = Instant(mono_s=100.0, unix_s=1_000.0)
        self.loop = DrivenLoop(self.archive, limits, lambda: self.now)
        self.events: list[Event] = []
        self.last: Changes | None = None
        self.lives: dict[str, str] = {}

    @property
    def state(self) -> State:
        return self.loop.state

    # time and transactions

    def take(self, *inputs: Callable[[Transaction], Any]) -> Changes:
        """One transaction with these inputs, at a tick; what follows is durable. Raises the error of one refused."""
        refused: list[PsError] = []
        for apply in (Transaction.tick, *inputs):
            drive(self.loop.ask(apply), lambda _: None, refused.append)
        self.archive.written = None
        self.loop.commit(lambda _: None)
        if refused:
            raise refused[0]
        changes = self.archive.written or Changes(state=self.state, events=(), lines=(), cuts={})
        self.events += [event for _, event in changes.events]
        self.last = changes
        return changes

    def wait(self, seconds: float, *, silent: frozenset[str] = frozenset()) -> None:
        """Let time pass; every node but the silent ones beats meanwhile."""
        end = self.now.mono_s + seconds
        while self.now.mono_s < end:
            step = min(0.5, end - self.now.mono_s)
            self.now = Instant(mono_s=self.now.mono_s + step, unix_s=self.now.unix_s + step)
            self.take(*(self._beat(node_id) for node_id in self.lives if node_id not in silent))

    def _beat(self, node_id: str) -> Callable[[Transaction], None]:
        return lambda tx: tx.beat(node_id, self.lives[node_id])

    def measure(self, name: str, microbatch_s: float) -> None:
        """A trainer's agent tells how long a microbatch took it."""
        placement = self.wanted()[name].placement
        received = {placement.process_id(self.job().job_id): (microbatch_s, 1)}
        self.take(lambda tx: tx.beat(placement.node_id, self.lives[placement.node_id], received))

    def restart(self) -> None:
        """The master dies and starts again: what was stored is all it knows."""
        self.loop = DrivenLoop(self.archive, self.limits, lambda: self.now)
        self.loop.state = self.archive.load(self.now)
        self.take()

    # nodes

    def join(self, node_id: str, slots: int = 1, life: str = "1", num_devices: int = 0) -> None:
        """A node registers in a life and opens its stream with nothing running."""
        node = Node(
            node_id=node_id,
            role=Role.WORKER if node_id.startswith("worker") else Role.SERVER,
            incarnation=f"{node_id}:{life}",
            slots=slots,
            devices=tuple(f"cuda:{index}" for index in range(num_devices)),
        )
        self.lives[node_id] = node.incarnation
        self.take(lambda tx: tx.register(node), lambda tx: tx.open_stream(node_id, node.incarnation, ()))

    def rejoin(self, node_id: str, *processes: Process, slots: int = 1) -> None:
        """A node comes back in the same life, with its processes."""
        role = Role.WORKER if node_id.startswith("worker") else Role.SERVER
        node = Node(node_id=node_id, role=role, incarnation=self.lives[node_id], slots=slots)
        self.take(lambda tx: tx.register(node), lambda tx: tx.open_stream(node_id, self.lives[node_id], processes))

    def cluster(self, workers: int = 2, servers: int = 2) -> None:
        for index in range(workers):
            self.join(f"worker-{index}")
        for index in range(servers):
            self.join(f"server-{index}")

    # processes

    def job(self, job_id: str = "job-aaaaaa") -> Job:
        return self.state.jobs[job_id]

    def wanted(self, job_id: str = "job-aaaaaa") -> dict[str, Desired]:
        """What should run of a job, by placement: "trainer-0", "partition-0", "standby-0"."""
        wanted = desired(self.job(job_id))
        return {f"standby-{p.placement.rank}" if p.placement.standby else p.placement.name: p for p in wanted}

    def report(self, placement: str, report: Report, job_id: str = "job-aaaaaa") -> Changes:
        """The process now in a placement reports."""
        process = self.wanted(job_id)[placement]
        return self.report_as(process.placement.node_id, process.process_id, report)

    def report_as(self, node_id: str, process_id: str, report: Report) -> Changes:
        return self.take(lambda tx: tx.reported(node_id, process_id, report))

    def exit(self, placement: str, job_id: str = "job-aaaaaa", **how: Any) -> Changes:
        """The process now in a placement ends."""
        process = self.wanted(job_id)[placement]
        ended = Exit(**how)
        return self.take(lambda tx: tx.exited(process.placement.node_id, process.process_id, ended))

    def suspect(self, placement: str, suspicion: str, job_id: str = "job-aaaaaa") -> Changes:
        """The agent of the process now in a placement suspects it; empty: no longer."""
        process = self.wanted(job_id)[placement]
        return self.take(lambda tx: tx.suspected(process.placement.node_id, process.process_id, suspicion))

    def unreached(self, placement: str, *partitions: int, generation: int | None = None) -> Changes:
        """The agent of the process now in a placement says which partitions that cannot reach; none: it reaches all."""
        process = self.wanted()[placement]
        received = Unreached(
            generation=self.job().generation if generation is None else generation, partitions=frozenset(partitions)
        )
        return self.take(lambda tx: tx.suspected(process.placement.node_id, process.process_id, "", received))

    def ready(self, job_id: str = "job-aaaaaa") -> None:
        """Every process that has not said anything yet reports ready."""
        for name, process in self.wanted(job_id).items():
            if name not in self.wanted(job_id):
                return  # that was the last word the job waited for, and it ended
            if not process.placement.active and process.process_id not in self.state.processes:
                self.report(name, TRAINER if process.placement.kind is ProcessKind.TRAINER else PARTITION, job_id)

    def commit(self, *steps: int, job_id: str = "job-aaaaaa", generation: int | None = None) -> Changes:
        """The coordinator reports steps under the newest generation, or an older one."""
        report = Progress(
            generation=self.job(job_id).generation if generation is None else generation,
            step=steps[-1],
            records=tuple(make_record(step) for step in steps),
        )
        return self.report("partition-0", report, job_id)

    def snapshot(self, step: int, job_id: str = "job-aaaaaa", generation: int | None = None) -> None:
        """Every partition reports its part."""
        for name, process in self.wanted(job_id).items():
            if process.placement.kind is ProcessKind.PARTITION and not process.placement.standby:
                self.report(name, self.part(step, process.placement.rank, job_id, generation), job_id)

    def in_sync(self, *ranks: int, job_id: str = "job-aaaaaa", in_sync: bool = True) -> None:
        """Partitions report that their standbys can be relied on, or do not answer."""
        for rank in ranks:
            standby = self.job(job_id).standby(rank)
            assert standby is not None
            statement = StandbyState(
                generation=self.job(job_id).generation, attempt=standby.attempt, in_sync=in_sync, detail="so it is"
            )
            self.report(f"partition-{rank}", statement, job_id)

    def part(self, step: int, index: int, job_id: str = "job-aaaaaa", generation: int | None = None) -> Part:
        current = self.job(job_id).generation if generation is None else generation
        path = f"step-{step}.part-{index}.generation-{current}"
        return Part(step=step, partition=index, generation=current, path=path, size_bytes=9, checksum="crc32c:0")

    def finish(self, step: int = 100, *, stopped: bool = False, job_id: str = "job-aaaaaa") -> Changes:
        generation = self.job(job_id).generation
        return self.report(
            "partition-0", Finished(generation=generation, step=step, stopped=stopped, parameters_sha256="f00d"), job_id
        )

    def running(self, workers: int = 2, **changes: Any) -> None:
        """A cluster with one job that has committed step 5."""
        self.train(workers, **changes)

    def train(self, num_workers: int, /, **changes: Any) -> None:
        """The same, where the spec's `workers` may be among the changes."""
        self.cluster(num_workers)
        self.submit(**changes)
        self.ready()
        self.snapshot(0)
        self.commit(1, 2, 3, 4, 5)
        assert self.job().state is JobState.RUNNING

    def submit(self, job_id: str = "job-aaaaaa", **changes: Any) -> None:
        job = make_job(job_id, created_s=self.now.unix_s, **changes)
        self.take(lambda tx: tx.submit(job))

    def reasons(self) -> list[str]:
        """What happened, in words of one."""
        return [event.reason for event in self.events]


def failure(code: str, cause: str = "it broke", **fields: Any) -> Failure:
    return Failure(error=ErrorInfo(code=code, cause=cause), **fields)


def same(left: float, right: float) -> bool:
    """Equal, NaN included."""
    return left == right or (math.isnan(left) and math.isnan(right))
