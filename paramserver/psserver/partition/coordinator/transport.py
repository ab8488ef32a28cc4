"""The coordinator's words on the wire: decisions and calls to partitions, directives and evaluations to trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pscluster.job.spec import JobSpec
from pscluster.v1.plan_pb2 import Plan, ProcessReport
from pscluster.wire.frame import AckResult, FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Join
from pscluster.wire.protocol import Outcome, pack_statistics, unpack_statistics
from psserver.partition.coordinator.coordinator import Coordinator, Outputs
from psserver.partition.ingress.clients import Client, Clients
from psserver.partition.replication.metadata import ReplicatedMetadata
from psserver.partition.step.commit import Member


class CoordinatorTransport:
    """Carries what a `Coordinator` says over the clients' connections; partition 0, which leads, hears it directly."""

    def __init__(
        self,
        spec: JobSpec,
        plan: Plan,
        clients: Clients,
        receive_decision: Callable[[CommitDecision], None],
        report: Callable[[ProcessReport], None],
        evaluated: Callable[[int, Mapping[str, float]], None],
        taken_over: tuple[Member, ReplicatedMetadata] | None = None,
    ) -> None:
        """`taken_over`: by a standby, with what it knows; None: at the plan's resume step."""
        self._clients = clients
        self._hear_decision = receive_decision
        out = Outputs(
            send_decision=self._send_decision,
            send_vote_request=self._send_call,
            direct=self._direct,
            send_merged=self._send_merged,
            report=report,
            evaluated=evaluated,
        )
        self.coordinator = (
            Coordinator.taking_over(spec, plan, out, *taken_over) if taken_over else Coordinator.at(spec, plan, out)
        )

    def welcome(self, client: Client) -> None:
        """Tell a trainer that has just connected what is going on."""
        if self.coordinator.is_open:
            self._send_directive([client])
            self._send_merged()

    def hear(self, client: Client, header: Header, body: memoryview) -> None:
        """A node of an evaluation, or its outcome."""
        if header.kind is FrameKind.STATISTICS:
            self.coordinator.statistics(header.step, header.node, unpack_statistics(body))
        else:
            self.coordinator.outcome(header.step, Outcome.unpack(body))
        self._clients.acknowledge(client, header, AckResult.APPLIED, -1)

    def report_progress(self, now_s: float) -> None:
        """Report what was committed since the last time, if it is time."""
        pushers = {client.index for client in self._clients.on("push")}
        self.coordinator.report_progress(now_s, connected=len(pushers))

    def _send_decision(self, index: int, decision: CommitDecision) -> None:
        if index == 0:
            self._hear_decision(decision)
        else:
            self._to_partition(index, FrameKind.DECISION, decision.step, decision.pack())

    def _send_call(self, index: int) -> None:
        if index != 0:  # its own vote is cast again when the partition adopts the plan
            self._to_partition(index, FrameKind.JOIN, self.coordinator.version, Join().pack())

    def _to_partition(self, index: int, kind: FrameKind, step: int, body: bytes) -> None:
        members = [client for client in self._clients.on("vote") if client.index == index]
        self._clients.broadcast(members, kind, step, body)

    def _direct(self) -> None:
        self._send_directive(self._clients.on("pull"))

    def _send_directive(self, trainers: list[Client]) -> None:
        directive = self.coordinator.directive
        self._clients.broadcast(trainers, FrameKind.DIRECTIVE, directive.version, directive.pack())

    def _send_merged(self) -> None:
        coordinator = self.coordinator
        if coordinator.merged is None:
            return
        holders = {
            placement.rank
            for placement in coordinator.plan.trainers
            if any(r.first <= 0 < r.first + r.count for r in placement.shards)
        }
        owners = [client for client in self._clients.on("pull") if client.index in holders]
        self._clients.broadcast(owners, FrameKind.MERGED, coordinator.version, pack_statistics(coordinator.merged))
