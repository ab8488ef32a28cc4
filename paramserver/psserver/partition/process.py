"""The partition's process: frames and orders in, the step's state machine in the middle, frames and reports out."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from pscluster.agent.link import UNREACHED_S, ProcessLink
from pscluster.errors import FrameError, InternalError, PsError
from pscluster.job.spec import JobSpec
from pscluster.step.layout import Layout
from pscluster.step.summary import Summary
from pscluster.v1.plan_pb2 import Counters, Plan, PlanAdopted, ProcessReport, Unreached
from pscluster.wire.connection import Connection
from pscluster.wire.frame import FrameKind, Header, job_number
from pscluster.wire.partition_protocol import CommitDecision, Evaluation, Join, Vote
from pscluster.wire.protocol import Channel, Hello
from pscluster.wire.reactor import Reactor
from psserver.partition.agent_connection import AgentConnection
from psserver.partition.checkpoint.restoring import Restoring
from psserver.partition.checkpoint.saving import Saving
from psserver.partition.coordinator.client import CoordinatorClient
from psserver.partition.coordinator.coordinator import Coordinator, step_record
from psserver.partition.coordinator.transport import CoordinatorTransport
from psserver.partition.ingress.clients import Client, Clients
from psserver.partition.ingress.frame_handler import FrameHandler
from psserver.partition.ingress.handshake import greet
from psserver.partition.replication.metadata import ReplicatedMetadata
from psserver.partition.replication.primary import Replication
from psserver.partition.replication.standby import Standby
from psserver.partition.step import commit
from psserver.partition.step.commit import Member
from psserver.partition.step.cycle import StepCycle
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.optimizer import moments_of
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters


class PartitionService(AgentConnection):
    """Partition `index` of one job, or a standby of it, as the plan says.

    Everything happens on the reactor's thread but the writing of snapshots."""

    def __init__(self, link: ProcessLink, spec: JobSpec, reactor: Reactor, counters: PartitionCounters) -> None:
        super().__init__(link, reactor)
        self.spec = spec
        self.index = link.start.rank
        self.counters = counters
        self.plan: Plan | None = None
        self.state: PartitionState | None = None
        self.step: OpenStep | None = None
        self.member = Member(generation=0, step=0)
        self.versions: dict[int, int] = {}  # of each bucket's values
        self.notes = ReplicatedMetadata()
        self.coordinator_transport: CoordinatorTransport | None = None  # of partition 0
        self.standby: Standby | None = None  # while it stands by
        self._job = job_number(link.start.job_id)
        self.clients = Clients(self.header)
        self._coordinator_client: CoordinatorClient | None = None
        self._reception = FrameHandler(self)
        self.replication = Replication(reactor, self)
        self.saving = Saving(link.start, spec, counters, self._report_part, reactor.post)
        self._restoring = Restoring(link.start, reactor, self.report)
        self.cycle = StepCycle(self, reactor.post)
        self._early: list[tuple[Client, Header, bytes]] = []

    def close(self) -> None:
        """Finish the snapshots that are begun. After the reactor has stopped."""
        super().close()
        self.saving.close()

    def counted(self) -> Counters:
        state_bytes = self.state.size_bytes if self.state else 0
        if self.standby is not None:
            return self.counters.sample_standby(self.index, self.version, state_bytes)
        bond = self.replication.bond if self.spec.durability.tier == "replica" else None
        lag = self.replication.lag_steps or 0
        return self.counters.sample(self.index, self.version, state_bytes, self.clients.pull_bytes, bond, lag)

    def unreached(self) -> Unreached | None:
        plan, coordinator_client = self.plan, self._coordinator_client
        if plan is None or coordinator_client is None or coordinator_client.unreached_s(time.monotonic()) < UNREACHED_S:
            return None
        return Unreached(generation=plan.generation, partitions=[0])

    @property
    def progress(self) -> int:
        return self.cycle.progress

    def beaten(self) -> None:
        if self.coordinator_transport is not None:
            self.coordinator_transport.report_progress(time.monotonic())

    def report_steps(self) -> None:
        """Tell the master of every step that it has not heard of, if this is the coordinator."""
        if self.coordinator_transport is not None:
            self.coordinator_transport.coordinator.report_progress(time.monotonic(), force=True)

    def _report_part(self, report: ProcessReport) -> None:
        """Steps first: who goes back to a snapshot never commits again, and so never tells, what came before it."""
        self.report_steps()
        self.report(report)

    def settled(self, path: str) -> None:
        self.saving.settled(path)

    # ---- plans ----

    def adopt(self, plan: Plan) -> None:
        """A newer plan is in force from here on; with a newer restore everything older is dropped."""
        held = self.plan
        if held is not None and plan.generation <= held.generation:
            if plan.generation == held.generation:
                self.saving.retain(plan.kept_steps)  # the catalogue grew; nothing else may change in a generation
            return
        if not (self._is_partition(plan) or self._stands_by(plan)):
            return  # somebody else has its place: its agent is about to end it
        self.plan = plan
        try:
            if held is None or plan.restore_generation != held.restore_generation:
                self._restore(plan)
            elif self.standby is not None and not self._stands_by(plan):
                self._take_over(plan, self.standby)
            else:
                self._go_on(plan)
        except PsError as error:
            self.plan = self.step = None  # nobody is welcome, as before the first plan
            if not self._restoring.wait(plan, error, self.adopt):
                self.give_up(error)
            return
        self.saving.retain(plan.kept_steps)
        self.report(ProcessReport(plan_adopted=PlanAdopted(generation=plan.generation, step=self.member.step)))

    def _is_partition(self, plan: Plan) -> bool:
        """Whether a plan has this very process be the partition; 0 is whoever gets the plan."""
        return plan.partitions[self.index].attempt in (0, self.attempt)

    def _stands_by(self, plan: Plan) -> bool:
        """Whether a plan has this very process stand by for the partition."""
        placement = plan.partitions[self.index]
        return placement.HasField("standby") and self.attempt == placement.standby.attempt != placement.attempt

    def _go_on(self, plan: Plan) -> None:
        """A new generation of the same timeline: votes are cast again under it, maybe to another coordinator."""
        self.member = commit.member_adopts(self.member, plan.generation)
        if self.standby is not None:
            return
        if self.coordinator is not None:
            self.coordinator.adopt(plan)
        elif self._coordinator_client is not None:
            self._coordinator_client.follow(list(plan.partitions[0].addresses))
        self.replication.adopt(plan, restored=False)
        self.send_vote()
        self.try_vote()  # maybe it waited for a standby that is no more

    def _restore(self, plan: Plan) -> None:
        """Begin at the plan's resume step; a standby begins with nothing, and hears from its partition."""
        self._hang_up()
        self.saving.overwriting_all()
        layout = Layout.from_json(plan.layout_json)
        num_partitions = self.spec.servers.partitions
        if self.state is None or self.state.layout != layout:
            moments = moments_of(self.spec.train.optimizer)
            codec = self.spec.network.pull_codec
            self.state = PartitionState.empty(layout, self.index, num_partitions, moments, codec)
        self.standby = Standby(self) if self._stands_by(plan) else None
        if self.standby is None:
            self._restoring.restore(self.state, plan, num_partitions)
        else:
            self.state.reset()
        gradients = layout.gradient_bytes(self.state.spans, self.spec.network.push_codec)
        self.clients.largest_bytes = max(gradients, default=0)
        self.begin_at(plan.resume_step)
        self.notes = ReplicatedMetadata(saved=plan.resume_step)
        if self.standby is None:
            self._speak(plan, None)
            self.replication.adopt(plan, restored=True)
            if self.state.is_filled:
                self._filled()

    def _take_over(self, plan: Plan, standby: Standby) -> None:
        """The partition is gone, and this process, which holds all that it voted on, is the partition from now on."""
        self.clients.close_all()  # the one before may still live: what it says no longer counts
        if not standby.is_synced:
            raise InternalError(f"a standby of partition {self.index} is to take over, and holds nothing")
        self.standby = None
        self.member = commit.member_adopts(self.member, plan.generation)
        self._speak(plan, (self.member, self.notes))
        self.replication.adopt(plan, restored=True)
        if self.notes.saved == self.version and not self.is_updating:
            self._save()  # the one before may not have come to it
        if self.coordinator is not None:
            if self.member.vote is not None and self.step is not None:
                self.coordinator.take_summary(self.step.summary.root)
            self.coordinator.join(0, self.member.step)
        self.send_vote()

    def _speak(self, plan: Plan, taken_over: tuple[Member, ReplicatedMetadata] | None) -> None:
        """Be the partition: to the coordinator, or as the coordinator."""
        self.saving.begin()
        if self.index == 0:
            self.coordinator_transport = CoordinatorTransport(
                self.spec, plan, self.clients, self.receive_decision, self.report, self._evaluated, taken_over
            )
        else:
            self._coordinator_client = CoordinatorClient(self._reactor, self, list(plan.partitions[0].addresses))

    def _hang_up(self) -> None:
        """Nothing of what was begun counts."""
        if self._coordinator_client is not None:
            self._coordinator_client.close()
        self._coordinator_client = self.coordinator_transport = None
        self.replication.close()
        self.clients.close_all()
        self._early.clear()
        self.cycle.restart()

    def begin_at(self, step: int) -> None:
        """Forget every step; the state is, or will be, that of `step`."""
        assert self.state is not None and self.plan is not None
        self.cycle.restart()
        self.step = OpenStep(self.state, self.spec, self.plan.final_step)
        self.member = Member(generation=self.plan.generation, step=step)
        self.version = step
        self.versions = {span.bucket: step for span in self.state.spans}

    def _filled(self) -> None:
        """Every value is here: this partition may take part."""
        if self.version == 0:
            self._save()
        if self.coordinator is not None:
            self.coordinator.join(0, self.version)
        elif self._coordinator_client is not None:
            self._coordinator_client.join()
        self.replication.at_boundary()

    def take_initial(self, bucket: int) -> None:
        """A bucket has its first values."""
        assert self.state is not None
        was_filled = self.state.is_filled
        self.state.publish(bucket)
        self.state.filled.add(bucket)
        if self.state.is_filled and not was_filled:
            self._filled()

    # ---- votes and decisions ----

    def try_vote(self) -> None:
        """Vote if the open step is complete, its standby has it, and this partition has not voted."""
        self.replication.offer()
        self.cycle.try_vote()

    def may_vote(self) -> bool:
        """Whether nothing but the step itself keeps the vote back."""
        return self.replication.may_vote() if self.standby is None else self.standby.is_synced

    def send_vote(self) -> None:
        """Cast the vote on the open step, if there is one; repeating it is harmless. A standby says that it has it."""
        vote = self.member.vote
        if vote is None:
            return
        if self.standby is not None:
            self.standby.say_held()
        elif self.coordinator is not None:
            self.coordinator.vote(vote)
        elif self._coordinator_client is not None:
            self._coordinator_client.vote(vote)

    def receive_vote_request(self) -> None:
        """The coordinator asks for this partition's vote."""
        self.send_vote()

    def receive_decision(self, decision: CommitDecision) -> None:
        """The coordinator's decision."""
        self.cycle.receive_decision(decision)

    def decided(self, decision: CommitDecision, summary: Summary) -> None:
        """A decision is about to be carried out."""
        if self.standby is None:
            self.replication.decided(decision)
        elif self.index == 0 and self.plan is not None:
            self.notes.records.append(step_record(self.spec, self.plan.final_step, decision, summary))
        if decision.snapshot:
            self.notes.saved = decision.step + 1

    def step_done(self, decision: CommitDecision) -> None:
        """The decision is carried out; the next step is open."""
        if self.standby is not None:
            self.standby.resume_reading()
            return
        if decision.snapshot:
            self._save(last=decision.last)
        self.replication.at_boundary()
        early, self._early = self._early, []
        for client, header, body in early:
            if client.connection.is_open:
                self._reception.frame(client.connection, header, memoryview(body))

    def overwriting(self, bucket: int) -> None:
        """A bucket's values are about to change: who was to read the old ones gets a copy."""
        self.clients.overwriting(bucket)
        self.saving.overwriting(bucket)

    @property
    def is_updating(self) -> bool:
        """Whether a decision is being carried out: the state is of no step."""
        return self.cycle.decision is not None

    def _evaluated(self, version: int, metrics: Mapping[str, float]) -> None:
        """The coordinator's evaluation is finalised: its standby hears of it before the next step."""
        self.notes.evaluations.append(Evaluation(version, metrics))
        self.replication.note()

    def _save(self, *, last: bool = False) -> None:
        """Have the newest version written in the background; `last`: the job may end with it."""
        assert self.state is not None and self.plan is not None
        last = last or self.version == self.plan.final_step
        self.saving.write(self.state, self.version, self.plan.generation, last=last)

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

    def greet(self, client: Client, header: Header, hello: Hello) -> None:
        """A HELLO."""
        greet(self, client, header, hello)

    def handle_coordinator_frame(self, client: Client, header: Header, body: memoryview) -> None:
        """What only the coordinator hears: votes, joins, evaluations, outcomes."""
        if self.coordinator_transport is None:
            raise FrameError(
                f"{header.kind.name} sent to a partition that does not coordinator", details={"field": "kind"}
            )
        if header.kind is FrameKind.VOTE:
            self.coordinator_transport.coordinator.vote(Vote.unpack(header, body))
        elif header.kind is FrameKind.JOIN:
            self.coordinator_transport.coordinator.join(client.index, header.step, Join.unpack(body).last)
        else:
            self.coordinator_transport.hear(client, header, body)

    def handle_primary_frame(self, client: Client, header: Header, body: memoryview) -> None:  # noqa: ARG002 - it has but one
        """What only a standby hears: a state, decisions, notes."""
        if self.standby is None:
            raise FrameError(f"{header.kind.name} sent to a partition", details={"field": "kind"})
        self.standby.hear(header, body)

    def piece_target(self, header: Header) -> memoryview:
        """Where a piece of a state belongs."""
        if self.standby is None:
            raise FrameError(f"{header.kind.name} sent to a partition", details={"field": "kind"})
        return self.standby.target(header)

    # ---- plumbing ----

    @property
    def coordinator(self) -> Coordinator | None:
        """The coordinator's part, in partition 0."""
        return self.coordinator_transport.coordinator if self.coordinator_transport is not None else None

    @property
    def handler(self) -> FrameHandler:
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

    def make_hello(self, channel: Channel) -> tuple[Header, Hello]:
        """The HELLO to open a connection with."""
        assert self.plan is not None
        hello = Hello(
            token=self.plan.data_token.hex(),
            role="partition",
            channel=channel,
            attempt=self.attempt,
            restore_generation=self.plan.restore_generation,
        )
        return self.header(kind=FrameKind.HELLO), hello

    @property
    def job(self) -> int:
        """The job's number in frames."""
        return self._job

    def connection_closed(self, connection: Connection) -> None:
        """A connection is gone; its nodes stay, its credit goes with it."""
        self.clients.forget(connection)
