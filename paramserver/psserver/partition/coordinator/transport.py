"""The lead's words on the wire: verdicts and calls to partitions, directives and evaluations to trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pscluster.job.spec import JobSpec
from pscluster.step.summary import unpack_statistics
from pscluster.v1.plan_pb2 import Plan, ProcessReport
from pscluster.wire.frame import AckResult, FrameKind, Header
from psserver.partition import messages
from psserver.partition.coordinator.coordinator import Coordinator, Outputs
from psserver.partition.ingress.clients import Client, Clients
from psserver.partition.replication.metadata import Notes
from psserver.partition.step.commit import Member, Verdict


class LeadWire:
    """Carries what a `Coordinator` says over the clients' connections; partition 0, which leads, hears it directly."""

    def __init__(
        self,
        spec: JobSpec,
        plan: Plan,
        clients: Clients,
        hear_verdict: Callable[[Verdict], None],
        report: Callable[[ProcessReport], None],
        evaluated: Callable[[int, Mapping[str, float]], None],
        taken_over: tuple[Member, Notes] | None = None,
    ) -> None:
        """`taken_over`: by a standby, with what it knows; None: at the plan's resume step."""
        self._clients = clients
        self._hear_verdict = hear_verdict
        out = Outputs(
            send_verdict=self._send_verdict,
            send_call=self._send_call,
            direct=self._direct,
            send_merged=self._send_merged,
            report=report,
            evaluated=evaluated,
        )
        self.lead = (
            Coordinator.taking_over(spec, plan, out, *taken_over) if taken_over else Coordinator.at(spec, plan, out)
        )

    def welcome(self, client: Client) -> None:
        """Tell a trainer that has just connected what is going on."""
        if self.lead.is_open:
            self._clients.broadcast([client], FrameKind.DIRECTIVE, self.lead.version, self.lead.directive)
            self._send_merged()

    def hear(self, client: Client, header: Header, body: memoryview) -> None:
        """A node of an evaluation, or its outcome."""
        if header.kind is FrameKind.STATISTICS:
            self.lead.statistics(header.step, header.node, unpack_statistics(body))
        else:
            self.lead.outcome(header.step, messages.json_mapping(body))
        self._clients.acknowledge(client, header, AckResult.APPLIED, -1)

    def report_progress(self, now_s: float) -> None:
        """Report what was committed since the last time, if it is time."""
        pushers = {client.index for client in self._clients.on("push")}
        self.lead.report_progress(now_s, connected=len(pushers))

    def _send_verdict(self, index: int, verdict: Verdict) -> None:
        if index == 0:
            self._hear_verdict(verdict)
        else:
            self._to_partition(index, FrameKind.VERDICT, verdict.step, messages.pack_verdict(verdict))

    def _send_call(self, index: int) -> None:
        if index != 0:  # its own vote is cast again when the partition adopts the plan
            self._to_partition(index, FrameKind.JOIN, self.lead.version, b"")

    def _to_partition(self, index: int, kind: FrameKind, step: int, body: bytes) -> None:
        members = [client for client in self._clients.on("vote") if client.index == index]
        self._clients.broadcast(members, kind, step, body)

    def _direct(self) -> None:
        self._clients.broadcast(self._clients.on("pull"), FrameKind.DIRECTIVE, self.lead.version, self.lead.directive)

    def _send_merged(self) -> None:
        lead = self.lead
        if lead.merged is None:
            return
        holders = {
            seat.rank for seat in lead.plan.trainers if any(r.first <= 0 < r.first + r.count for r in seat.shards)
        }
        owners = [client for client in self._clients.on("pull") if client.index in holders]
        self._clients.broadcast(owners, FrameKind.MERGED, lead.version, lead.merged.tobytes())
