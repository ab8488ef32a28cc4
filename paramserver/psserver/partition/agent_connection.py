"""A partition's connection to its agent: orders in; reports, counters and heartbeats out."""

from __future__ import annotations

from pscluster.agent.link import HeartbeatThread, ProcessLink
from pscluster.agent.status import detail_of
from pscluster.errors import PsError
from pscluster.v1.plan_pb2 import Beat, Counters, Failure, Plan, ProcessReport, Unreached
from pscluster.wire.reactor import Reactor

COUNTERS_S = 1.0


class AgentConnection:
    """The side of a partition's process that its agent sees; the subclass is the partition. On the reactor's thread."""

    def __init__(self, link: ProcessLink, reactor: Reactor) -> None:
        self.link = link
        self.failed = False
        self._reactor = reactor
        self._heartbeat = HeartbeatThread(link, lambda: Beat(progress=self.progress, unreached=self.unreached()))

    def start(self) -> None:
        """Begin to send heartbeats and to read orders; the first plan may come later."""
        self._heartbeat.start()
        self._reactor.watch(self.link.fileno(), self._orders)
        if self.link.start.HasField("plan"):
            self.adopt(self.link.start.plan)
        self._report_counters()

    def close(self) -> None:
        """End the heartbeats. After the reactor has stopped."""
        self._heartbeat.close()

    def adopt(self, plan: Plan) -> None:
        """A plan has arrived."""
        raise NotImplementedError

    def settled(self, path: str) -> None:
        """A part of a snapshot is on a second node, or never will be."""
        raise NotImplementedError

    def sample_counters(self) -> Counters:
        """Every counter as it is now."""
        raise NotImplementedError

    def unreached(self) -> Unreached | None:
        """The partitions that cannot be reached. From any thread."""
        raise NotImplementedError

    @property
    def version(self) -> int:
        """The newest committed version whose update is done."""
        raise NotImplementedError

    @property
    def progress(self) -> int:
        """A number that rises with the work that is done."""
        raise NotImplementedError

    def every_second(self) -> None:
        """A second has passed."""

    def report(self, report: ProcessReport) -> None:
        """Send a report to the agent, and through it to the master."""
        try:
            self.link.report(report)
        except EOFError:
            self._reactor.stop()

    def fail(self, error: PsError) -> None:
        """Report to the master why this process cannot go on."""
        detail = detail_of(error)
        self.report(ProcessReport(failure=Failure(error=detail, step=self.version)))

    def give_up(self, error: PsError) -> None:
        """Report to the master why, and end."""
        self.fail(error)
        self.failed = True
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
            elif order.WhichOneof("body") == "settled":
                self.settled(order.settled.path)

    def _report_counters(self) -> None:
        self.report(ProcessReport(counters=self.sample_counters()))
        self.every_second()
        self._reactor.call_later(COUNTERS_S, self._report_counters)
