"""A trainer's side of the data plane: what there is to do, values in, gradients out.

Two threads meet here. The reactor's thread moves bytes and hears directives and plans; the main thread asks for work
(`next_work`), waits for values, and pushes. One lock guards what they share; nothing waits for a peer while it is held.

Values land straight in the replica's memory, or are windows onto a partition's (see `values` and `landing`); what to do
is decided in `work`. What is sent is made in `pushing`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from pscluster.agent.link import UNREACHED_S, HeartbeatThread, ProcessLink
from pscluster.job.spec import JobSpec
from pscluster.step.layout import Layout
from pscluster.step.summary import Statistics
from pscluster.v1.plan_pb2 import (
    Beat,
    Connected,
    Connection,
    PartitionPlacement,
    Plan,
    PlanAdopted,
    ProcessReport,
    Unreached,
)
from pscluster.wire.frame import FrameKind, Header, job_number
from pscluster.wire.memory import Lanes
from pscluster.wire.protocol import Channel, Directive, Hello, Welcome, unpack_statistics
from pscluster.wire.reactor import Reactor
from psworker.staging import HostStaging, Staging
from psworker.trainer.gradients.pushing import Pushing, Send
from psworker.trainer.peer import Peer
from psworker.trainer.telemetry import TrainerCounters
from psworker.trainer.values.bucket_memory import BucketMemory
from psworker.trainer.values.values import Values
from psworker.trainer.work import Done, Work, find_work

COUNTERS_S = 1.0


class SupersededError(Exception):
    """The step being computed is no longer wanted: it was committed without this trainer, or undone."""


class Exchange:
    """Started by `start`, ended by `close`; the public methods below, and those of `pushing`, are the main thread's."""

    def __init__(
        self,
        link: ProcessLink,
        spec: JobSpec,
        layout: Layout,
        memory: BucketMemory,
        counters: TrainerCounters,
        staging: Staging | None = None,
    ) -> None:
        self._link = link
        self._spec = spec
        self._counters = counters
        self._job = job_number(link.start.job_id)
        self._rank = link.start.rank
        self.pushing = Pushing(spec, layout, self._job, self._rank, staging or HostStaging(), self._owe)
        self._reactor = Reactor(congestion_control=spec.network.congestion_control)
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._heart = HeartbeatThread(link, self._beat)
        self._changed = threading.Condition()
        # Shared, under `_changed`:
        self._plan: Plan | None = None
        self._directive: Directive | None = None
        self._stashed: Directive | None = None  # of a generation whose plan is not here yet
        self._merged: tuple[int, Statistics] | None = None
        self.values = Values(spec, layout, memory, self._changed)
        self._landing = self.values.landing
        self._needs_values: set[int] = set()  # partitions that hold nothing yet
        self._closed = False
        self._error: BaseException | None = None
        # The reactor thread's own:
        self._peers: list[Peer] = []
        self._reported_connections: list[Connection] = []
        self.progress = 0

    # ---- the main thread ----

    def start(self) -> None:
        """Begin to listen to the agent and, once there is a plan, to connect. Called once."""
        self._thread.start()
        self._heart.start()

    def close(self) -> None:
        """End the reactor and its connections; blocks briefly."""
        self._heart.close()
        self._reactor.post(self._reactor.stop)
        self._thread.join(timeout=5)

    def next_work(self, done: Done) -> Work | None:
        """Block until there is something to do that is not in `done`; None: the agent wants this process to end.

        Raises what ended the reactor's thread."""
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._closed:
                    return None
                if self._plan is not None:
                    work = find_work(self._plan, self._directive, self._merged, self._needs_values, self._rank, done)
                    if work is not None:
                        return work
                self._changed.wait()

    def is_current(self, work: Work) -> bool:
        """Whether the plan and the directive still ask for this work."""
        with self._changed:
            plan, directive = self._plan, self._directive
            return (
                not self._closed
                and plan is not None
                and directive is not None
                and plan.generation == work.generation
                and self._timeline() == work.timeline
                and (directive.version, directive.action) == (work.version, work.action)
            )

    def want(self, work: Work, version: int, exact: bool = False) -> bool:
        """Have exactly this version land from now on; the main thread must be between microbatches.

        `exact`: as the partitions hold it, whatever the pull codec. Going back to the version that is held succeeds
        while nothing of the newer one has begun to land. False: it is gone, a newer directive will come, or the work is
        of an older timeline, whose versions must not be asked for in the newer one."""
        with self._changed:
            if self._timeline() != work.timeline:
                return False
            answer = self.values.want(version, exact)
        if answer == "missing":
            self._reactor.post(self._pull_all)
        return answer != "gone"

    def forget_values(self) -> None:
        """The main thread has written other values to the replica's memory: it holds no version any more."""
        with self._changed:
            self._landing.restart()

    @property
    def has_landed(self) -> bool:
        """Whether all of the wanted version is there."""
        with self._changed:
            return self._landing.is_complete

    def wait_values(self, work: Work) -> None:
        """Block until all of the wanted version has landed. Raises SupersededError when it will not."""
        self._wait_until(lambda: self._landing.is_complete, work)

    def wait_bucket(self, work: Work, bucket: int) -> None:
        """Block until one bucket of the wanted version has landed. Raises SupersededError when it will not."""
        self._wait_until(lambda: self._landing.has_bucket(bucket), work)

    def _wait_until(self, condition: Callable[[], bool], work: Work) -> None:
        with self._changed:
            if condition():
                return
            with self._counters.pace.waiting():
                self._wait_for(condition, work)

    def _wait_for(self, condition: Callable[[], bool], work: Work) -> None:
        """Under the lock."""
        while not condition():
            if self._error is not None:
                raise self._error
            if self._closed or self._landing.is_superseded or self._timeline() != work.timeline:
                raise SupersededError(f"step {self._landing.wanted} is no longer wanted")
            self._changed.wait()

    def send_initial(self, work: Work) -> None:
        """Owe every partition that holds nothing the first values, which are in the replica's memory."""
        with self._changed:
            empty, self._needs_values = sorted(self._needs_values), set()
        self.pushing.initial(work, empty, self.values.memory)

    def _owe(self, order: int, header: Header, sends: Sequence[Send]) -> None:
        self._reactor.post(lambda: self._add_owed(order, header, sends))

    # ---- under the lock ----

    def _timeline(self) -> int:
        return self._plan.restore_generation if self._plan is not None else 0

    # ---- the reactor's thread ----

    def _run(self) -> None:
        try:
            self._reactor.watch(self._link.fileno(), self._orders)
            if self._link.start.HasField("plan"):
                self.adopt(self._link.start.plan)
            self._report_counters()
            self._reactor.run()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            for peer in self._peers:
                peer.close()
            self._reactor.close()

    def _beat(self) -> Beat:
        """On the heart's thread."""
        busy_s, typical_s = self._counters.pace.now()
        return Beat(
            progress=self.progress,
            speed=self._counters.speed(),
            busy_s=busy_s,
            typical_s=typical_s,
            unreached=self._unreached(),
        )

    def _unreached(self) -> Unreached | None:
        plan, peers, now_s = self._plan, self._peers, time.monotonic()
        indices = [peer.index for peer in peers if peer.unreached_s(now_s) >= UNREACHED_S]
        return Unreached(generation=plan.generation, partitions=indices) if plan is not None and indices else None

    def _report_counters(self) -> None:
        self._counters.observe(self._peers)
        self._report(ProcessReport(counters=self._counters.sample()))
        self._report_connections()
        self._reactor.call_later(COUNTERS_S, self._report_counters)

    def _report_connections(self) -> None:
        held = [
            Connection(trainer=self._rank, partition=peer.index, transport=peer.transport)
            for peer in self._peers
            if peer.is_connected
        ]
        if held != self._reported_connections:
            self._reported_connections = held
            self._report(ProcessReport(connected=Connected(connections=held)))

    def _report(self, report: ProcessReport) -> None:
        try:
            self._link.report(report)
        except EOFError:
            self._shut()

    def _orders(self) -> None:
        try:
            orders = self._link.receive_nowait()
        except EOFError:
            self._shut()
            return
        for order in orders:
            if order.WhichOneof("body") == "shutdown":
                self._shut()
            elif order.WhichOneof("body") == "plan":
                self.adopt(order.plan)

    def _shut(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reactor.stop()

    def adopt(self, plan: Plan) -> None:
        """A newer plan is in force from here on."""
        if self._plan is not None and plan.generation <= self._plan.generation:
            return
        held = self._plan
        restored = held is None or plan.restore_generation != held.restore_generation
        with self._changed:
            self._plan = plan
            if restored:
                self._needs_values = set()
                self._landing.restart()
            if restored or (held is not None and plan.coordinator_generation != held.coordinator_generation):
                self._directive, self._merged = None, None  # of a coordinator that is no more
            stashed, self._stashed = self._stashed, None
            self._changed.notify_all()
        self._reconnect(plan, restored)
        if stashed is not None:
            self._direct(stashed)
        self._report(
            ProcessReport(plan_adopted=PlanAdopted(generation=plan.generation, step=max(0, self._landing.wanted)))
        )

    def _reconnect(self, plan: Plan, restored: bool) -> None:
        """Dial the partitions anew after a restore; else those alone for which a standby has taken over. What they were
        owed goes with them: it is computed again."""
        if restored:
            for peer in self._peers:
                peer.close()
            self.values.restart()
            self._peers = [self._peer(placement) for placement in plan.partitions]
            return
        for index, placement in enumerate(plan.partitions):
            if list(placement.addresses) != self._peers[index].addresses:
                self._peers[index].close()
                self.values.forget(index)
                self._peers[index] = self._peer(placement)

    def _peer(self, placement: PartitionPlacement) -> Peer:
        return Peer(self._reactor, self, placement.index, list(placement.addresses), self._spec.network.transport)

    def make_hello(self, channel: Channel, *, share: bool) -> tuple[Header, Hello]:
        assert self._plan is not None
        header = Header(kind=FrameKind.HELLO, job=self._job, generation=self._plan.generation, sender=self._rank)
        hello = Hello(
            token=self._plan.data_token.hex(),
            role="trainer",
            channel=channel,
            attempt=self._link.start.attempt,
            restore_generation=self._plan.restore_generation,
            share=share,
            num_lanes=self.pushing.num_lanes,
        )
        return header, hello

    # ---- what peers hear (`Receiver`) ----

    def map_lanes(self, index: int, fd: int, num_lanes: int) -> Lanes:
        return self.pushing.map_lanes(index, fd, num_lanes)

    def unmap_lanes(self, index: int) -> None:
        self.pushing.unmap_lanes(index)

    def receive(self, index: int, header: Header, body: memoryview) -> None:  # noqa: ARG002 - the coordinator's
        if header.kind is FrameKind.DIRECTIVE:
            self._direct(Directive.unpack(header, body))
        elif header.kind is FrameKind.MERGED:
            with self._changed:
                self._merged = (header.step, unpack_statistics(body))
                self._changed.notify_all()

    def welcomed(self, index: int, welcome: Welcome) -> None:
        with self._changed:
            if welcome.needs_values:
                self._needs_values.add(index)
            self._changed.notify_all()
        self._pull(index)

    def _direct(self, directive: Directive) -> None:
        with self._changed:
            plan = self._plan
            if plan is None or directive.generation > plan.generation:
                self._stashed = directive
                return
            if directive.generation < plan.restore_generation:
                return
            self._directive = directive
            self._needs_values = set()  # the coordinator speaks once every partition has its first values
            self._changed.notify_all()
        for peer in self._peers:
            peer.outbox.drop_before(directive.version)

    def _add_owed(self, order: int, header: Header, sends: Sequence[Send]) -> None:
        plan = self._plan
        wanted = plan is not None and header.generation >= plan.restore_generation
        for send in sends:
            if wanted:
                self._peers[send.partition].outbox.add(order, header, send.parts, send.lane)
                self._peers[send.partition].push()
            elif send.lane is not None:
                send.lane.give_back()  # computed before a restore: nobody wants it

    def _pull_all(self) -> None:
        for index in range(len(self._peers)):
            self._pull(index)

    def _pull(self, index: int) -> None:
        with self._changed:
            wanted, plan = self._landing.wanted, self._plan
            missing = self._landing.is_missing_from(index)
            flags = self.values.pull_flags()
        if missing and plan is not None:
            header = Header(
                kind=FrameKind.PULL,
                job=self._job,
                generation=plan.generation,
                step=wanted,
                flags=flags,
                sender=self._rank,
            )
            self._peers[index].pull(header)
