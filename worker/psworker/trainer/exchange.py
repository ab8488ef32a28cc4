"""A trainer's side of the data plane: what there is to do, values in, gradients out.

Two threads meet here. The reactor's thread moves bytes and receives directives and plans; the main thread asks for
work (`agenda`), waits for values, and pushes (`pusher`). They share the lock `agenda.changed`; nothing waits for a peer
while it is held. Values land straight in the replica's memory, or are windows onto a partition's (see `values`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pscluster.agent.link import UNREACHED_S, HeartbeatThread, ProcessLink
from pscluster.job.spec import JobSpec
from pscluster.step.audit import AuditRule
from pscluster.step.layout import Layout
from pscluster.v1.plan_pb2 import Beat, Connected, Connection, PartitionPlacement, Plan, ProcessReport, Unreached
from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.protocol import Directive, unpack_statistics
from pscluster.wire.reactor import Reactor
from pscluster.wire.tls import DataSecurity
from psworker.replica import BucketMemory
from psworker.staging import Staging
from psworker.trainer.gradients.push import Pusher
from psworker.trainer.gradients.send_queue import SharedLanes
from psworker.trainer.peer import Peer
from psworker.trainer.telemetry import TrainerCounters
from psworker.trainer.values import Values
from psworker.trainer.work import Agenda, Work

COUNTERS_S = 1.0


class SupersededError(BaseException):
    """The step being computed is no longer wanted: it was committed without this trainer, or undone.

    Raised within the user's forward, too, where an operation waits for its parameters: no Exception, as asyncio's
    CancelledError is none, so that it passes through user code that catches errors of its own."""


class Exchange:
    """Started by `start`, ended by `close`. The public methods but `adopt` are the main thread's."""

    def __init__(
        self,
        link: ProcessLink,
        spec: JobSpec,
        layout: Layout,
        memory: BucketMemory,
        counters: TrainerCounters,
        staging: Staging | None = None,
        reactor: Reactor | None = None,
    ) -> None:
        """`memory` is the replica's, where values land. `reactor`: the loop to use; its own by default."""
        staging = staging or Staging()
        self.progress = 0  # counts what the main thread has done, for heartbeats
        train = spec.train
        audits = AuditRule(seed=train.seed, share=spec.audit.share, num_shards=train.num_shards)
        self.agenda = Agenda(link.start, audits)
        self.values = Values(spec, layout, memory, self.agenda.changed)
        self._link = link
        self._transport = spec.network.transport
        self._counters = counters
        self._security = DataSecurity.of(link.start)
        self._reactor = reactor or Reactor(congestion_control=spec.network.congestion_control, security=self._security)
        self._lanes = SharedLanes(spec, layout, staging)
        self.pusher = Pusher(spec, layout, self.agenda, self._lanes, staging, self._reactor)
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._heartbeat = HeartbeatThread(link, self._beat)
        self._reported_connections: list[Connection] = []

    # ---- the main thread ----

    def start(self) -> None:
        """Begin to receive orders from the agent and, once there is a plan, to connect. Called once."""
        self._thread.start()
        self._heartbeat.start()

    def close(self) -> None:
        """End the reactor and its connections; blocks briefly."""
        self._heartbeat.close()
        self._reactor.post(self._reactor.stop)
        self._thread.join(timeout=5)

    def want(self, work: Work, version: int, exact: bool = False) -> bool:
        """Have exactly this version land from now on; the main thread must be between microbatches.

        `exact`: as the partitions hold it, whatever the pull codec. Going back to the version that is held succeeds
        while nothing of the newer one has begun to land. False: it is gone, a newer directive will come, or the work is
        older than a restore, whose versions count anew."""
        with self.agenda.changed:
            if self.agenda.restore_generation != work.restore_generation:
                return False
            answer = self.values.want(version, exact)
        if answer == "missing":
            self._reactor.post(self._pull_all)
        return answer != "gone"

    def forget_values(self) -> None:
        """The main thread has written other values to the replica's memory: it holds no version any more."""
        with self.agenda.changed:
            self.values.landing.restart()

    @property
    def has_landed(self) -> bool:
        """Whether all of the wanted version is there."""
        with self.agenda.changed:
            return self.values.landing.is_complete

    def wait_values(self, work: Work) -> None:
        """Block until all of the wanted version has landed. Raises SupersededError when it will not."""
        self._wait_until(lambda: self.values.landing.is_complete, work)

    def wait_bucket(self, work: Work, bucket: int) -> None:
        """Block until one bucket of the wanted version has landed. Raises SupersededError when it will not."""
        self._wait_until(lambda: self.values.landing.has_bucket(bucket), work)

    def send_initial(self, work: Work) -> None:
        """Send the first values, which are in the replica's memory, to every partition that holds none."""
        self.pusher.initial(work, self.agenda.take_empty_partitions(), self.values.memory)

    def _wait_until(self, condition: Callable[[], bool], work: Work) -> None:
        landing, changed = self.values.landing, self.agenda.changed
        with changed:
            if condition():
                return
            with self._counters.timer.waiting():
                while not condition():
                    if not self.agenda.may_continue(work) or landing.is_superseded:
                        raise SupersededError(f"step {landing.wanted} is no longer wanted")
                    changed.wait()

    # ---- the reactor's thread: frames ----

    def _run(self) -> None:
        try:
            self._reactor.watch(self._link.fileno(), self._receive_orders)
            if self._link.start.HasField("plan"):
                self.adopt(self._link.start.plan)
            self._report_counters()
            self._reactor.run()
        except BaseException as error:
            self.agenda.close(error)
        finally:
            for peer in self.pusher.peers:
                peer.close()
            self._reactor.close()

    def _receive(self, header: Header, body: memoryview) -> None:
        """What the coordinator sends: a DIRECTIVE, MERGED or ARBITRATE."""
        if header.kind is FrameKind.DIRECTIVE:
            self._direct(Directive.unpack(header, body))
        elif header.kind is FrameKind.ARBITRATE:
            self.agenda.arbitrate(header.generation, header.step, header.node.first)
        else:
            self.agenda.merge(header.step, unpack_statistics(body))

    def _direct(self, directive: Directive) -> None:
        if self.agenda.direct(directive):
            for peer in self.pusher.peers:
                peer.pushes.queue.drop_before(directive.version)

    def _pull_all(self) -> None:
        for peer in self.pusher.peers:
            peer.pulls.pull()

    # ---- the reactor's thread: plans ----

    def _receive_orders(self) -> None:
        try:
            orders = self._link.receive_nowait()
        except EOFError:
            self._shut_down()
            return
        for order in orders:
            if order.WhichOneof("body") == "shutdown":
                self._shut_down()
            elif order.WhichOneof("body") == "plan":
                self.adopt(order.plan)
            elif order.WhichOneof("body") == "credentials" and self._security is not None:
                self._security.renew(order.credentials)

    def _shut_down(self) -> None:
        self.agenda.close()
        self._reactor.stop()

    def adopt(self, plan: Plan) -> None:
        """A newer plan is in force from here on. On the reactor's thread."""
        held = self.agenda.plan
        if held is not None and plan.generation <= held.generation:
            return
        restored = held is None or plan.restore_generation != held.restore_generation
        with self.agenda.changed:
            if restored:
                self.values.landing.restart()
            early = self.agenda.adopt(plan)
        self._reconnect(plan, restored)
        if early is not None:
            self._direct(early)

    def _reconnect(self, plan: Plan, restored: bool) -> None:
        """Dial the partitions anew after a restore; else only those for which a standby has taken over. Their pending
        frames are dropped: that work is done again."""
        peers = self.pusher.peers
        if restored:
            for peer in peers:
                peer.close()
            self.values.restart()
            self.pusher.peers = [self._connect(placement) for placement in plan.partitions]
            return
        for index, placement in enumerate(plan.partitions):
            if (
                placement.addresses != peers[index].placement.addresses
                or placement.attempt != peers[index].placement.attempt
            ):
                peers[index].close()
                self.values.forget(index)
                peers[index] = self._connect(placement)

    def _connect(self, placement: PartitionPlacement) -> Peer:
        return Peer(
            self._reactor, self.agenda, self._lanes, self.values, self._receive,
            placement, self._transport,
        )  # fmt: skip

    # ---- reports ----

    def _report(self, report: ProcessReport) -> None:
        try:
            self._link.report(report)
        except EOFError:
            self._shut_down()

    def _report_counters(self) -> None:
        reconnects = sum(peer.reconnects for peer in self.pusher.peers)
        self._report(ProcessReport(counters=self._counters.sample(reconnects)))
        held = [
            Connection(trainer=self.agenda.rank, partition=peer.index, transport=peer.transport)
            for peer in self.pusher.peers
            if peer.is_connected
        ]
        if held != self._reported_connections:
            self._reported_connections = held
            self._report(ProcessReport(connected=Connected(connections=held)))
        self._reactor.call_later(COUNTERS_S, self._report_counters)

    def _beat(self) -> Beat:
        """On the heartbeat's thread."""
        busy_s, typical_s = self._counters.timer.now()
        plan, peers, now_s = self.agenda.plan, self.pusher.peers, time.monotonic()
        missing = [peer for peer in peers if peer.unreached_s(now_s) >= UNREACHED_S]
        return Beat(
            progress=self.progress, speed=self._counters.speed(), busy_s=busy_s, typical_s=typical_s,
            unreached=_unreached(plan, missing) if plan and missing else None,
        )  # fmt: skip


def _unreached(plan: Plan, missing: list[Peer]) -> Unreached:
    reasons = [str(peer.failure or "") for peer in missing]
    return Unreached(generation=plan.generation, partitions=[peer.index for peer in missing], reasons=reasons)
