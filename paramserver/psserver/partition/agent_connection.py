"""A partition's line to its agent: orders in, reports, counters and beats out."""

from __future__ import annotations

from pscluster.agent.link import HeartbeatThread, ProcessLink
from pscluster.agent.status import detail_of
from pscluster.errors import PsError
from pscluster.v1.plan_pb2 import Beat, Counters, Failure, Plan, ProcessReport, Unreached
from pscluster.wire.reactor import Reactor

COUNTERS_S = 1.0


class AgentConnection:
    """What a partition's process is to its agent; the partition itself is the subclass. On the reactor's thread."""

    version = 0  # the newest committed step whose update is done

    def __init__(self, link: ProcessLink, reactor: Reactor) -> None:
        self.link = link
        self.failed = False
        self._reactor = reactor
        self._heart = HeartbeatThread(link, lambda: Beat(progress=self.progress, unreached=self.unreached()))

    def start(self) -> None:
        """Begin to beat, and to listen to the agent; the first plan may take its time."""
        self._heart.start()
        self._reactor.watch(self.link.fileno(), self._orders)
        if self.link.start.HasField("plan"):
            self.adopt(self.link.start.plan)
        self._report_counters()

    def close(self) -> None:
        """No longer beat. After the reactor has stopped."""
        self._heart.close()

    @property
    def attempt(self) -> int:
        """Which process of its placement it is."""
        return self.link.start.attempt

    def adopt(self, plan: Plan) -> None:
        """A plan has come."""
        raise NotImplementedError

    def settled(self, path: str) -> None:
        """A part of a snapshot is on a second node, or never will be."""
        raise NotImplementedError

    def counted(self) -> Counters:
        """Every counter as it is now."""
        raise NotImplementedError

    def unreached(self) -> Unreached | None:
        """The partitions that cannot be reached. From any thread."""
        raise NotImplementedError

    @property
    def progress(self) -> int:
        """A number that rises with the work that is done."""
        raise NotImplementedError

    def beaten(self) -> None:
        """A second has passed."""

    def report(self, report: ProcessReport) -> None:
        """Tell the agent, and through it the master."""
        try:
            self.link.report(report)
        except EOFError:
            self._reactor.stop()

    def fail(self, error: PsError) -> None:
        """Tell the master why this process cannot go on."""
        detail = detail_of(error)
        self.report(ProcessReport(failure=Failure(error=detail, step=self.version)))

    def give_up(self, error: PsError) -> None:
        """Tell the master why, and end."""
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
        self.report(ProcessReport(counters=self.counted()))
        self.beaten()
        self._reactor.call_later(COUNTERS_S, self._report_counters)
