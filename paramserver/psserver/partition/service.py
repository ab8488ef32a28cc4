"""The partition's process: frames and orders in, the step's state machine in the middle, frames and reports out."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from pscluster.agent.heart import Heart
from pscluster.agent.link import ProcessLink
from pscluster.errors import FrameError, PsError
from pscluster.layout import Layout
from pscluster.spec import JobSpec
from pscluster.v1.plan_pb2 import Beat, ErrorDetail, Failure, Plan, PlanAdopted, ProcessReport
from pscluster.wire.connection import Connection
from pscluster.wire.frame import Header, Kind, job_number
from pscluster.wire.reactor import Reactor
from psserver.partition import commit, messages
from psserver.partition.clients import Client, Clients
from psserver.partition.commit import Member, Verdict
from psserver.partition.cycle import StepCycle
from psserver.partition.greeting import greet
from psserver.partition.lead import Lead
from psserver.partition.lead_wire import LeadWire
from psserver.partition.optimizer import moments_of
from psserver.partition.reception import Reception
from psserver.partition.saving import Saving
from psserver.partition.state import PartitionState
from psserver.partition.step import OpenStep
from psserver.partition.telemetry import PartitionCounters
from psserver.partition.uplink import Uplink

COUNTERS_S = 1.0


class PartitionService:
    """Partition `index` of one job. Everything happens on the reactor's thread but the writing of snapshots."""

    def __init__(self, link: ProcessLink, spec: JobSpec, reactor: Reactor, counters: PartitionCounters) -> None:
        self.link = link
        self.spec = spec
        self.index = link.start.rank
        self.counters = counters
        self.plan: Plan | None = None
        self.state: PartitionState | None = None
        self.step: OpenStep | None = None
        self.member = Member(generation=0, step=0)
        self.versions: dict[int, int] = {}  # of each bucket's values
        self.version = 0  # of all of them: the newest committed step whose update is done
        self.lead_wire: LeadWire | None = None  # of partition 0
        self._reactor = reactor
        self._job = job_number(link.start.job_id)
        self.clients = Clients(self.header)
        self._uplink: Uplink | None = None
        self._reception = Reception(self)
        self.saving = Saving(
            link.start.job_id,
            Path(link.start.store),
            self.index,
            spec.servers.partitions,
            counters,
            self.report,
            reactor.post,
        )
        self.cycle = StepCycle(self, reactor.post)
        self._early: list[tuple[Client, Header, bytes]] = []
        self._heart = Heart(link, lambda: Beat(progress=self.cycle.progress))
        self.failed = False

    # ---- the agent ----

    def start(self) -> None:
        """Begin to listen to the agent, and to beat."""
        self._reactor.watch(self.link.fileno(), self._orders)
        if self.link.start.HasField("plan"):
            self.adopt(self.link.start.plan)
        self._report_counters()
        self._heart.start()

    def close(self) -> None:
        """Finish the snapshots that are begun. After the reactor has stopped."""
        self._heart.close()
        self.saving.close()

    def report(self, report: ProcessReport) -> None:
        try:
            self.link.report(report)
        except EOFError:
            self._reactor.stop()

    def _orders(self) -> None:
        try:
            orders = self.link.receive_nowait()
        except EOFError:
            self._reactor.stop()
            return
        for order in orders:
            if order.WhichOneof("body") == "shutdown":
                self._reactor.stop()
            elif order.WhichOneof("body") == "plan":
                self.adopt(order.plan)

    def _report_counters(self) -> None:
        state_bytes = self.state.size_bytes if self.state else 0
        counters = self.counters.sample(self.index, self.version, state_bytes, self.clients.pull_bytes)
        self.report(ProcessReport(counters=counters))
        if self.lead_wire is not None:
            self.lead_wire.report_progress(time.time())
        self._reactor.call_later(COUNTERS_S, self._report_counters)

    def fail(self, error: PsError) -> None:
        """Tell the master why this process cannot go on."""
        detail = ErrorDetail(code=error.code, cause=error.cause, action=error.action, details=error.details)
        self.report(ProcessReport(failure=Failure(error=detail, step=self.version)))

    # ---- plans ----

    def adopt(self, plan: Plan) -> None:
        """A newer plan is in force from here on; with a newer restore everything older is dropped."""
        if self.plan is not None and plan.generation <= self.plan.generation:
            if plan.generation == self.plan.generation:
                self.saving.retain(plan.kept_steps)  # the catalogue grew; nothing else may change in a generation
            return
        restored = self.plan is None or plan.restore_generation != self.plan.restore_generation
        self.plan = plan
        if restored:
            try:
                self._restore(plan)
            except PsError as error:
                error.details["void_snapshot"] = str(plan.resume_step)  # the master falls back to an older one
                self.fail(error)
                self.failed = True
                self._reactor.stop()
                return
        else:
            self.member = commit.member_adopts(self.member, plan.generation)
            if self.lead is not None:
                self.lead.adopt(plan)
            self.send_vote()
        self.saving.retain(plan.kept_steps)
        self.report(ProcessReport(plan_adopted=PlanAdopted(generation=plan.generation, step=self.member.step)))

    def _restore(self, plan: Plan) -> None:
        if self._uplink is not None:
            self._uplink.close()
        self.clients.close_all()
        self._early.clear()
        self.cycle.restart()
        layout = Layout.from_json(plan.layout_json)
        num_partitions = self.spec.servers.partitions
        if self.state is None or self.state.layout != layout:
            moments = moments_of(self.spec.train.optimizer)
            codec = self.spec.network.pull_codec
            self.state = PartitionState.empty(layout, self.index, num_partitions, moments, codec)
        if plan.resume_step:
            part = next(part for part in plan.restore.parts if part.partition == self.index)
            path = Path(self.link.start.store) / part.path
            self.state.load(path, self.index, num_partitions, plan.resume_step)
        else:
            self.state.reset()
        self.step = OpenStep(self.state, self.spec, plan.final_step)
        gradients = layout.gradient_bytes(self.state.spans, self.spec.network.push_codec)
        self.clients.largest_bytes = max(gradients, default=0)
        self.member = Member(generation=plan.generation, step=plan.resume_step)
        self.version = plan.resume_step
        self.versions = {span.bucket: plan.resume_step for span in self.state.spans}
        leads = self.index == 0
        self.lead_wire = LeadWire(self.spec, plan, self.clients, self.hear_verdict, self.report) if leads else None
        lead_addresses = list(plan.partitions[0].addresses)
        self._uplink = None if leads else Uplink(self._reactor, self, lead_addresses)
        if self.state.is_filled:
            self._filled()

    def _filled(self) -> None:
        """Every value is here: this partition may take part."""
        if self.version == 0:
            self._save()
        if self.lead is not None:
            self.lead.join(0, self.version)
        elif self._uplink is not None:
            self._uplink.join()

    def take_initial(self, bucket: int) -> None:
        """A bucket has its first values."""
        assert self.state is not None
        was_filled = self.state.is_filled
        self.state.publish(bucket)
        self.state.filled.add(bucket)
        if self.state.is_filled and not was_filled:
            self._filled()

    # ---- votes and verdicts ----

    def try_vote(self) -> None:
        """Vote if the open step is complete and this partition has not."""
        self.cycle.try_vote()

    def send_vote(self) -> None:
        """Cast the vote on the open step, if there is one; repeating it is harmless."""
        vote = self.member.vote
        if vote is None:
            return
        if self.lead is not None:
            self.lead.vote(vote)
        elif self._uplink is not None:
            self._uplink.vote(vote)

    def hear_call(self) -> None:
        """The lead asks for this partition's vote."""
        self.send_vote()

    def hear_verdict(self, verdict: Verdict) -> None:
        """The lead's verdict."""
        self.cycle.hear_verdict(verdict)

    def step_done(self, verdict: Verdict) -> None:
        """The verdict is carried out; the next step is open."""
        if verdict.snapshot:
            self._save()
        early, self._early = self._early, []
        for client, header, body in early:
            if client.connection.is_open:
                self._reception.frame(client.connection, header, memoryview(body))

    def _save(self) -> None:
        assert self.state is not None and self.plan is not None
        self.saving.write(self.state, self.version, self.plan.generation)

    def serve_pulls(self) -> None:
        """Send what is owed and new enough."""
        if self.state is not None:
            with self.counters.phase("send"):
                self.clients.serve_pulls(self.state, self.version_of)

    def version_of(self, bucket: int) -> int:
        """Which version a bucket's values are; frozen ones are as new as everything else."""
        assert self.state is not None
        frozen = self.state.layout.buckets[bucket].kind == "frozen"
        return self.version if frozen else self.versions[bucket]

    def hold_early(self, client: Client, header: Header, body: memoryview) -> None:
        """A frame of the next step, from a trainer that needs nothing of this partition to be there already."""
        self._early.append((client, header, bytes(body)))

    # ---- callers ----

    def greet(self, client: Client, header: Header, told: dict[str, object]) -> None:
        """A HELLO."""
        greet(self, client, header, told)

    def hear_lead_business(self, client: Client, header: Header, body: memoryview) -> None:
        """What only the lead hears: votes, joins, evaluations, outcomes."""
        if self.lead_wire is None:
            raise FrameError(f"{header.kind.name} sent to a partition that does not lead", details={"field": "kind"})
        if header.kind is Kind.VOTE:
            self.lead_wire.lead.vote(messages.unpack_vote(header, body))
        elif header.kind is Kind.JOIN:
            self.lead_wire.lead.join(client.index, header.step)
        else:
            self.lead_wire.hear(client, header, body)

    # ---- plumbing ----

    @property
    def lead(self) -> Lead | None:
        """The lead's part, in partition 0."""
        return self.lead_wire.lead if self.lead_wire is not None else None

    @property
    def handler(self) -> Reception:
        """What accepted connections talk to."""
        return self._reception

    @property
    def open_bucket(self) -> int:
        """The bucket of gradients that is waited for first; -1: none."""
        return self.step.open_bucket if self.step else -1

    def release(self, client: Client, words: torch.Tensor, step: OpenStep) -> None:
        """Memory of a client's node is free again."""
        step.pool.give(words)
        self.clients.credit(client, words.nbytes, self.open_bucket)

    def header(self, **fields: object) -> Header:
        """A header of this job, generation and sender."""
        generation = self.plan.generation if self.plan else 0
        return Header(job=self._job, generation=generation, sender=self.index, **fields)  # type: ignore[arg-type]

    @property
    def job(self) -> int:
        """The job's number in frames."""
        return self._job

    def connection_closed(self, connection: Connection) -> None:
        """A connection is gone; its nodes stay, its credit goes with it."""
        self.clients.forget(connection)
