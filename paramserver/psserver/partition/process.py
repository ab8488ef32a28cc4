"""The process of a partition: orders and frames in, actions carried out in one loop; reports and heartbeats out.

A pushed gradient: `FrameHandler.frame` checks it and gives it to the open step; `TryVote`, `SendVote`, `SendDecision`,
`OpenNextStep`, `ApplyBucket` and `ServePulls` take the step from there to the trainers' new values."""

from __future__ import annotations

import time
from collections import deque
from typing import assert_never

from pscluster.agent.link import UNREACHED_S, HeartbeatThread, ProcessLink
from pscluster.agent.status import detail_of
from pscluster.errors import InternalError, PsError
from pscluster.job.spec import JobSpec
from pscluster.step.layout import Layout
from pscluster.step.tree import TreeNode
from pscluster.v1.plan_pb2 import Beat, Counters, Failure, Plan, ProcessReport, Unreached
from pscluster.wire.frame import FrameKind
from pscluster.wire.partition_protocol import CommitDecision, Join, Vote
from pscluster.wire.reactor import Reactor
from pscluster.wire.tls import DataSecurity
from psserver.partition import actions
from psserver.partition.actions import Action
from psserver.partition.checkpoint.saving import Restoring, Saving
from psserver.partition.coordinator.client import CoordinatorClient
from psserver.partition.coordinator.coordinator import Coordinator, step_record
from psserver.partition.ingress.frame_handler import FrameHandler
from psserver.partition.partition import Partition
from psserver.partition.replication.in_sync import ReplicatedMetadata
from psserver.partition.replication.primary import Replication
from psserver.partition.replication.standby import Standby
from psserver.partition.step.kernels import moments_of
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters

COUNTERS_S = 1.0
SLICE_S = 0.0015  # of updates, after which trainers get them: long enough not to spend it on messages


class PartitionService(Partition):
    """One partition, or its standby. All but the writing of snapshots happens on the reactor's thread."""

    def __init__(
        self,
        link: ProcessLink,
        spec: JobSpec,
        reactor: Reactor,
        counters: PartitionCounters,
        security: DataSecurity | None = None,
    ) -> None:
        """`security`: the reactor's."""
        super().__init__(spec, link.start, counters)
        self.failed = False
        self._security = security
        self.link = link
        self._reactor = reactor
        self._heartbeat = HeartbeatThread(link, self.beat)
        self.handler = FrameHandler(self, self.carry_out)  # of accepted connections
        self.replication = Replication(reactor, self, self.carry_out)
        self.saving = Saving(link.start, spec, counters, self.carry_out, reactor.post)
        self._restoring = Restoring(link.start, reactor, self.report)
        self._coordinator_client: CoordinatorClient | None = None  # of every partition but 0
        self._slice_ends_s = 0.0

    def start(self) -> None:
        """Begin to send heartbeats and to read orders; the first plan may come later."""
        self._heartbeat.start()
        self._reactor.watch(self.link.fileno(), self._orders)
        if self.link.start.HasField("plan"):
            self.adopt(self.link.start.plan)
        self._report_counters()

    def close(self) -> None:
        """End the heartbeats, and finish the snapshots that are begun. After the reactor has stopped."""
        self._heartbeat.close()
        self.saving.close()

    # ---- actions ----

    def carry_out(self, wanted: list[Action]) -> None:
        """The one loop: each action, then what follows from it, then the next."""
        pending = deque(wanted)
        while pending:
            pending.extendleft(reversed(self._carry_out(pending.popleft())))

    def _carry_out(self, action: Action) -> list[Action]:
        match action:
            case actions.TryVote():
                return self._try_vote()
            case actions.SendVote(vote):
                return self._send_vote(vote)
            case actions.SendHeld():
                if self.standby is not None:
                    primary = self.clients.on("replica")
                    self.clients.broadcast(primary, FrameKind.HELD, self.standby.acked_version, b"")
            case actions.ReplicateDecision(decision):
                self._replicate(decision)
            case actions.OpenNextStep(decision):
                self._slice_ends_s = time.perf_counter() + SLICE_S
                return self.machine.open_next(decision)
            case actions.ApplyBucket(bucket):
                return self._apply(bucket)
            case actions.ServePulls():
                self._serve_pulls()
            case actions.WriteSnapshot(last):
                self._write_snapshot(last)
            case actions.SyncStandby():
                self.replication.at_boundary()
            case actions.ResumeReading():
                for client in self.clients.on("replica"):
                    client.connection.resume_reading()
            case actions.ReplayEarly():
                self.handler.replay_early()
            case actions.JoinJob():
                return self._join()
            case actions.SendDecision(index, decision) if index == self.index:
                return self.machine.receive_decision(decision)
            case actions.SendDecision(index, decision):
                self._send_to(index, FrameKind.DECISION, decision.step, decision.pack())
            case actions.RequestVote(index, step):
                if index != self.index:  # its own vote is sent again when it adopts the plan
                    self._send_to(index, FrameKind.JOIN, step, Join().pack())
            case actions.BroadcastDirective(directive):
                trainers = self.clients.on("pull")
                self.clients.broadcast(trainers, FrameKind.DIRECTIVE, directive.version, directive.pack())
            case actions.SendMerged(step, ranks, body):
                owners = [client for client in self.clients.on("pull") if client.index in ranks]
                self.clients.broadcast(owners, FrameKind.MERGED, step, body)
            case actions.RequestDigest(rank, step, shard):
                header = self.header(kind=FrameKind.ARBITRATE, step=step, node=TreeNode(shard, 1))
                for client in self.clients.on("pull"):
                    if client.index == rank:
                        client.connection.send(header)
            case actions.ReplicateEvaluation(evaluation):
                self.metadata.evaluations.append(evaluation)
                self.replication.send_metadata()
            case actions.Report(report):
                self.report(report)
            case actions.ReportSteps():
                return self.coordinator.report_progress(time.monotonic(), force=True) if self.coordinator else []
            case actions.BeginAt(step, last_decision, metadata):
                self._begin_at(step, last_decision)
                self.metadata = ReplicatedMetadata()
                self.metadata.receive(metadata)
            case actions.AdoptMetadata(metadata):
                self.metadata.receive(metadata)
            case _:
                assert_never(action)
        return []

    def _try_vote(self) -> list[Action]:
        """Vote if the open step is complete, its standby has it, and this partition has not voted."""
        self.replication.offer()
        if not self.machine.is_complete():
            return []
        if not (self.standby.is_synced if self.standby is not None else self.replication.may_vote()):
            return []
        with self.counters.phase("vote"):
            return self.machine.vote()

    def _send_vote(self, vote: Vote) -> list[Action]:
        if self.coordinator is not None:
            assert self.step is not None
            self.coordinator.take_summary(self.step.summary.root)
            with self.counters.phase("vote"):
                return self.coordinator.vote(vote)
        if self._coordinator_client is not None:
            self._coordinator_client.vote(vote)
        return []

    def _replicate(self, decision: CommitDecision) -> None:
        """Before the sums change: the standby gets the decision; the coordinator's standby records the step."""
        if self.standby is None:
            self.replication.decided(decision)
        elif self.index == 0 and self.plan is not None and self.step is not None:
            summary = self.step.summary.root
            self.metadata.records.append(step_record(self.spec, self.plan.final_step, decision, summary))
        if decision.snapshot:
            self.metadata.saved = decision.step + 1

    def _apply(self, bucket: int) -> list[Action]:
        """Update a bucket. After SLICE_S connections are served before the next one."""
        self.clients.overwriting(bucket)  # what is still being sent of the old values is copied
        self.saving.overwriting(bucket)
        with self.counters.phase("update"):
            following = self.machine.apply(bucket)
        if not self.machine.is_updating or time.perf_counter() < self._slice_ends_s:
            return following
        if self.standby is not None:
            for client in self.clients.on("replica"):
                client.connection.pause_reading()  # a vote, and with it a decision, needs the update to be done
        self._serve_pulls()
        self._reactor.post(self._continue_update)
        return []

    def _continue_update(self) -> None:
        self._slice_ends_s = time.perf_counter() + SLICE_S
        self.carry_out(self.machine.next_update())

    def _serve_pulls(self) -> None:
        if self.state is not None:
            with self.counters.phase("send"):
                self.clients.serve_pulls(self.state, self.version_of)

    def _write_snapshot(self, last: bool = False) -> None:
        assert self.state is not None and self.plan is not None
        last = last or self.version == self.plan.final_step
        self.saving.write(self.state, self.version, self.plan.generation, last=last)

    def _join(self) -> list[Action]:
        found: list[Action] = [actions.WriteSnapshot()] if self.version == 0 else []
        if self.coordinator is not None:
            found += self.coordinator.join(0, self.version)
        elif self._coordinator_client is not None:
            self._coordinator_client.join()
        return [*found, actions.SyncStandby()]

    def _send_to(self, index: int, kind: FrameKind, step: int, body: bytes) -> None:
        members = [client for client in self.clients.on("vote") if client.index == index]
        self.clients.broadcast(members, kind, step, body)

    def _begin_at(self, step: int, last_decision: CommitDecision | None = None) -> None:
        assert self.state is not None and self.plan is not None
        open_step = OpenStep(self.state, self.spec, self.plan.final_step)
        self.machine.restart(open_step, self.plan.generation, step, last_decision)

    # ---- the agent ----

    def report(self, report: ProcessReport) -> None:
        """Send a report to the agent, and through it to the master."""
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
            elif order.WhichOneof("body") == "credentials" and self._security is not None:
                self._security.renew(order.credentials)
            elif order.WhichOneof("body") == "settled":
                self.saving.settled(order.settled.path)

    def _report_counters(self) -> None:
        self.report(ProcessReport(counters=self.sample_counters()))
        if self.coordinator is not None:
            self.carry_out(self.coordinator.every_second(time.monotonic()))
        self._reactor.call_later(COUNTERS_S, self._report_counters)

    def sample_counters(self) -> Counters:
        state_bytes = self.state.size_bytes if self.state else 0
        if self.standby is not None:
            return self.counters.sample_standby(self.index, self.version, state_bytes)
        in_sync = self.replication.in_sync if self.spec.durability.tier == "replica" else None
        lag = self.replication.lag_steps or 0
        return self.counters.sample(self.index, self.version, state_bytes, self.clients.pull_bytes, in_sync, lag)

    def beat(self) -> Beat:
        """Progress, a number that rises with the work that is done, and what cannot be reached. From any thread."""
        plan, client = self.plan, self._coordinator_client
        beat = Beat(progress=self.machine.progress)
        if plan is not None and client is not None and client.line.unreached_s(time.monotonic()) >= UNREACHED_S:
            reasons = [str(client.line.failure or "")]
            beat.unreached.CopyFrom(Unreached(generation=plan.generation, partitions=[0], reasons=reasons))
        return beat

    def give_up(self, error: PsError) -> None:
        """Report to the master why this process cannot go on, and end."""
        self.report(ProcessReport(failure=Failure(error=detail_of(error), step=self.version)))
        self.failed = True
        self._reactor.stop()

    # ---- plans ----

    def adopt(self, plan: Plan) -> None:
        """A newer plan is in force from here on; with a newer restore everything older is dropped."""
        held = self.plan
        if held is not None and plan.generation <= held.generation:
            if plan.generation == held.generation:
                self.saving.retain(plan.kept_steps)  # the catalogue grew; nothing else may change in a generation
            return
        if not (self._is_partition(plan) or self._stands_by(plan)):
            return  # another process has its place: its agent is about to end it
        self.plan = plan
        try:
            if held is None or plan.restore_generation != held.restore_generation:
                self._restore(plan)
            elif self.standby is not None and not self._stands_by(plan):
                self._take_over(plan, self.standby)
            else:
                self._go_on(plan)
        except PsError as error:
            self.plan = self.machine.step = None  # no caller is welcome, as before the first plan
            if not self._restoring.wait(plan, error, self.adopt):
                self.give_up(error)
            return
        self.saving.retain(plan.kept_steps)

    def _is_partition(self, plan: Plan) -> bool:
        """Whether a plan has this very process be the partition; attempt 0 names any process."""
        return plan.partitions[self.index].attempt in (0, self.attempt)

    def _stands_by(self, plan: Plan) -> bool:
        """Whether a plan has this very process stand by for the partition."""
        placement = plan.partitions[self.index]
        return placement.HasField("standby") and self.attempt == placement.standby.attempt != placement.attempt

    def _go_on(self, plan: Plan) -> None:
        """A new generation without a restore: votes are sent again under it, maybe to another coordinator."""
        self.machine.adopt(plan.generation)
        if self.standby is not None:
            return
        if self.coordinator is not None:
            self.carry_out(self.coordinator.adopt(plan))
        elif self._coordinator_client is not None:
            self._coordinator_client.follow(plan)
        self.replication.adopt(plan, restored=False)
        self.carry_out(self.machine.vote_again())
        self.carry_out([actions.TryVote()])  # it may have waited for a standby that the plan no longer names

    def _restore(self, plan: Plan) -> None:
        """Begin at the plan's resume step; a standby begins with nothing, and receives a state from its primary."""
        self._disconnect()
        self.saving.overwriting_all()
        layout = Layout.from_json(plan.layout_json)
        num_partitions = self.spec.servers.partitions
        if self.state is None or self.state.layout != layout:
            moments = moments_of(self.spec.train.optimizer)
            codec = self.spec.network.pull_codec
            self.state = PartitionState.empty(layout, self.index, num_partitions, moments, codec)
        self.standby = Standby(self.state, self.machine) if self._stands_by(plan) else None
        self.machine.stands_by = self.standby is not None
        if self.standby is None:
            self._restoring.restore(self.state, plan, num_partitions)
        else:
            self.state.reset()
        gradients = layout.gradient_bytes(self.state.spans, self.spec.network.push_codec)
        self.clients.largest_bytes = max(gradients, default=0)
        self._begin_at(plan.resume_step)
        self.metadata = ReplicatedMetadata(saved=plan.resume_step)
        if self.standby is None:
            self.saving.begin()
            if self.index == 0:
                self.coordinator = Coordinator.at(self.spec, plan)
            else:
                self._coordinator_client = CoordinatorClient(self._reactor, self, plan, self.carry_out)
            self.replication.adopt(plan, restored=True)
            if self.state.is_filled:
                self.carry_out([actions.JoinJob()])

    def _take_over(self, plan: Plan, standby: Standby) -> None:
        """The primary is gone: this process, which holds all that it voted on, is the partition from now on."""
        self.clients.close_all()  # the primary may still live: its frames no longer count
        if not standby.is_synced:
            raise InternalError(f"a standby of partition {self.index} is to take over, and holds nothing")
        self.standby, self.machine.stands_by = None, False
        self.machine.adopt(plan.generation)
        self.saving.begin()
        if self.index == 0:
            self.coordinator = Coordinator.taking_over(self.spec, plan, self.member, self.metadata)
            for evaluation in self.metadata.evaluations:  # reports of the primary may be lost
                self.carry_out(self.coordinator.report_evaluated(evaluation))
        else:
            self._coordinator_client = CoordinatorClient(self._reactor, self, plan, self.carry_out)
        self.replication.adopt(plan, restored=True)
        if self.metadata.saved == self.version and not self.machine.is_updating:
            self._write_snapshot()  # the primary may not have begun it
        if self.coordinator is not None:
            self.carry_out(self.coordinator.join(0, self.member.step))
        self.carry_out(self.machine.vote_again())

    def _disconnect(self) -> None:
        """Close every connection, and drop what is begun."""
        if self._coordinator_client is not None:
            self._coordinator_client.line.close()
        self._coordinator_client = self.coordinator = None
        self.replication.close()
        self.clients.close_all()
        self.handler.early.clear()
        self.machine.decision = None
