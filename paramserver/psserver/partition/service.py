"""The partition's process: frames and orders in, the step's state machine in the middle, frames and reports out."""

from __future__ import annotations

import hmac
import json
import time
from pathlib import Path

import torch

from pscluster.agent.heart import Heart
from pscluster.agent.link import ProcessLink
from pscluster.errors import AuthError, FrameError, PsError
from pscluster.layout import Layout
from pscluster.snapshot import Written
from pscluster.spec import JobSpec
from pscluster.v1.plan_pb2 import (
    Beat,
    ErrorDetail,
    Failure,
    Plan,
    PlanAdopted,
    ProcessReport,
    SnapshotPart,
)
from pscluster.v1.plan_pb2 import (
    Warning as WarningMessage,
)
from pscluster.wire.connection import Connection
from pscluster.wire.frame import Header, Kind, job_number
from pscluster.wire.memory import Lanes
from pscluster.wire.reactor import Reactor
from psserver.partition import commit, messages
from psserver.partition.clients import Client, Clients
from psserver.partition.commit import Member, Verdict, Vote
from psserver.partition.lead import Lead
from psserver.partition.lead_wire import LeadWire
from psserver.partition.optimizer import moments_of
from psserver.partition.reception import Reception
from psserver.partition.snapshots import SnapshotWriter
from psserver.partition.state import PartitionState
from psserver.partition.step import OpenStep
from psserver.partition.telemetry import PartitionCounters
from psserver.partition.uplink import Uplink

COUNTERS_S = 1.0
SLICE_S = 0.0015  # of updates, after which trainers hear of them: long enough not to spend it on messages
MIN_CREDIT_BYTES = 64 << 20
MAX_LANES = 8  # nodes of one bucket that a trainer may leave in shared memory at a time


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
        self._lead_wire: LeadWire | None = None  # of partition 0
        self._reactor = reactor
        self._job = job_number(link.start.job_id)
        self.clients = Clients(self.header)
        self._uplink: Uplink | None = None
        self._reception = Reception(self)
        self._snapshots = SnapshotWriter(Path(link.start.store), self.index, reactor.post)
        self._early: list[tuple[Client, Header, bytes]] = []
        self._verdict: Verdict | None = None  # being carried out
        self._progress = 0
        self._heart = Heart(link, lambda: Beat(progress=self._progress))
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
        self._snapshots.close()

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
        if self._lead_wire is not None:
            self._lead_wire.report_progress(time.monotonic())
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
                self._snapshots.retain(plan.kept_steps)  # the catalogue grew; nothing else may change in a generation
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
            self._send_vote()
        self._snapshots.retain(plan.kept_steps)
        self.report(ProcessReport(plan_adopted=PlanAdopted(generation=plan.generation, step=self.member.step)))

    def _restore(self, plan: Plan) -> None:
        if self._uplink is not None:
            self._uplink.close()
        self.clients.close_all()
        self._early.clear()
        self._verdict = None
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
        self._lead_wire = LeadWire(self.spec, plan, self.clients, self.hear_verdict, self.report) if leads else None
        lead_addresses = list(plan.partitions[0].addresses)
        self._uplink = None if leads else Uplink(self._reactor, self, lead_addresses)
        if self.state.is_filled:
            self._filled()

    def _filled(self) -> None:
        """Every value is here: this partition may take part."""
        if self.version == 0:
            self._write_snapshot()
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
        step = self.step
        if step is None or self.plan is None or self.member.vote is not None or self._verdict is not None:
            return
        if not step.is_complete:
            return
        with self.counters.phase("vote"):
            squares, finite = step.ballot()
            if self.lead is not None:
                self.lead.take_summary(step.summary.root)
            vote = Vote(
                generation=self.plan.generation,
                step=self.member.step,
                partition=self.index,
                squares=squares,
                finite=finite,
            )
            self.member = commit.cast_vote(self.member, vote)
            self._send_vote()

    def _send_vote(self) -> None:
        vote = self.member.vote
        if vote is None:
            return
        if self.lead is not None:
            self.lead.vote(vote)
        elif self._uplink is not None:
            self._uplink.vote(vote)

    def hear_call(self) -> None:
        """The lead asks for this partition's vote."""
        self._send_vote()

    def hear_verdict(self, verdict: Verdict) -> None:
        """Carry out a verdict, bucket by bucket, serving connections in between."""
        self.member, now = commit.receive_verdict(self.member, verdict)
        if not now or verdict.kind == "stop":
            return
        assert self.step is not None
        self._verdict = verdict
        self.step.decide(verdict)
        self._update_next()

    def _update_next(self) -> None:
        """Update buckets for a moment, then let trainers have them and connections have their turn."""
        step, state, verdict = self.step, self.state, self._verdict
        if step is None or state is None or verdict is None:
            return  # a restore came in between
        until_s = time.perf_counter() + SLICE_S
        while (bucket := step.next_update()) is not None:
            self._progress += 1
            with self.counters.phase("update"):
                self.clients.overwriting(bucket)
                step.update()
            self.versions[bucket] = verdict.step + 1
            if time.perf_counter() >= until_s:
                break
        if step.next_update() is None:
            self._step_done(verdict)
        else:
            self.serve_pulls()
            self._reactor.post(self._update_next)

    def _step_done(self, verdict: Verdict) -> None:
        assert self.state is not None
        self.version = verdict.step + 1
        self.versions = dict.fromkeys(self.versions, self.version)
        self._verdict = None
        self.serve_pulls()
        if verdict.snapshot:
            self._write_snapshot()
        early, self._early = self._early, []
        for client, header, body in early:
            if client.connection.is_open:
                self._reception.frame(client.connection, header, memoryview(body))
        self.try_vote()  # a fast trainer may have completed the next step before this one was put away

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

    # ---- snapshots ----

    def _write_snapshot(self) -> None:
        assert self.state is not None and self.plan is not None
        generation, step = self.plan.generation, self.version
        meta = self.state.meta(self.link.start.job_id, step, generation, self.index, self.spec.servers.partitions)
        with self.counters.phase("snapshot"):
            pieces = self.state.pieces()
        self._snapshots.write(
            meta, self.state.layout, pieces, lambda written, error: self._wrote(step, generation, written, error)
        )

    def _wrote(self, step: int, generation: int, written: Written | None, error: PsError | None) -> None:
        if error is not None:
            detail = ErrorDetail(code=error.code, cause=error.cause, action=error.action, details=error.details)
            self.report(ProcessReport(warning=WarningMessage(error=detail, step=step)))
        elif written is not None:
            self.counters.snapshots += 1
            part = SnapshotPart(
                step=step,
                partition=self.index,
                generation=generation,
                path=written.path.name,
                size_bytes=written.size_bytes,
                checksum=written.checksum,
            )
            self.report(ProcessReport(snapshot_part=part))

    # ---- greetings ----

    def greet(self, client: Client, header: Header, told: dict[str, object]) -> None:
        """A HELLO: check it, and welcome the caller. A caller of another timeline is sent away and comes again."""
        plan = self.plan
        if plan is None or self.state is None:
            client.connection.close()  # no plan yet; the caller dials again
            return
        if not hmac.compare_digest(str(told.get("token", "")).encode(errors="replace"), plan.data_token.hex().encode()):
            raise AuthError("a data connection without the job's token")
        timeline = told.get("restore_generation")
        if not isinstance(timeline, int):
            raise FrameError("a greeting without a restore_generation", details={"field": "body"})
        if timeline != plan.restore_generation:
            if timeline < plan.restore_generation:
                body = json.dumps({"generation": plan.generation}).encode()
                client.connection.send(self.header(kind=Kind.FENCED), [body])
                self.counters.fenced += 1
            client.connection.close()
            return
        client.channel, client.index = str(told.get("channel", "")), header.sender
        if client.channel not in ("push", "pull", "vote"):
            raise FrameError(f"a connection for {client.channel!r}", details={"field": "channel"})
        client.connection.context = client.channel  # greeted: the reactor's deadline is met
        client.granted_bytes = client.told_bytes = max(MIN_CREDIT_BYTES, 2 * self.clients.largest_bytes)
        fds = self._share_memory(client, told.get("num_lanes")) if told.get("share") is True else []
        welcome = {
            "granted_bytes": client.granted_bytes,
            "open_bucket": self.open_bucket,
            "needs_values": not self.state.is_filled,
            "num_lanes": client.lanes.num_lanes if client.lanes else 0,
        }
        client.connection.send(self.header(kind=Kind.WELCOME), [json.dumps(welcome).encode()], fds=fds)
        if client.channel == "pull" and self._lead_wire is not None:
            self._lead_wire.welcome(client)

    def _share_memory(self, client: Client, num_lanes: object) -> list[int]:
        """Agree to share memory with a caller on this host; what it is to map."""
        state, network = self.state, self.spec.network
        if state is None or not client.connection.is_local or network.transport not in ("auto", "shm"):
            return []
        if client.channel == "pull":
            client.reads_memory = True
            return [state.segment.fd]
        if not isinstance(num_lanes, int) or not 1 <= num_lanes <= MAX_LANES:
            raise FrameError(f"a greeting that asks for {num_lanes} lanes", details={"field": "body"})
        client.lanes = Lanes.create(state.layout.gradient_bytes(state.spans, network.push_codec), num_lanes)
        return [client.lanes.fd]

    def hear_lead_business(self, client: Client, header: Header, body: memoryview) -> None:
        """What only the lead hears: votes, joins, evaluations, outcomes."""
        if self._lead_wire is None:
            raise FrameError(f"{header.kind.name} sent to a partition that does not lead", details={"field": "kind"})
        if header.kind is Kind.VOTE:
            self._lead_wire.lead.vote(messages.unpack_vote(header, body))
        elif header.kind is Kind.JOIN:
            self._lead_wire.lead.join(client.index, header.step)
        else:
            self._lead_wire.hear(client, header, body)

    # ---- plumbing ----

    @property
    def lead(self) -> Lead | None:
        """The lead's part, in partition 0."""
        return self._lead_wire.lead if self._lead_wire is not None else None

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
