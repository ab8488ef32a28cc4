"""A partition's process: the real `PartitionService` with its coordinator, gate, votes, optimizer and snapshots."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pscluster.job.spec import parse_spec
from pscluster.v1.plan_pb2 import PartitionReady, ProcessReport, ProcessSpec
from psserver.partition.process import PartitionService
from psserver.partition.telemetry import PartitionCounters
from tests.fault.simulation.dataplane import Link, Reactor
from tests.fault.simulation.schedule import SOON_S, Life

NUMERICS = "0" * 16
EXIT_FAILED = 1


class PartitionProcess:
    """`ended` hears the exit code when the process ends by itself; `report` takes what it tells its agent."""

    def __init__(
        self,
        sim: Any,
        life: Life,
        host: str,
        start: ProcessSpec,
        report: Callable[[ProcessReport], None],
        ended: Callable[[int], None],
    ) -> None:
        self.sim = sim
        self.life = life
        self.process_id = start.process_id
        self.job_id = start.job_id
        self._ended = ended
        self._ending = False
        self.link = Link(life, start, report)
        self.reactor = Reactor(sim.network, life, host, self._stopped)
        spec = parse_spec(json.loads(start.spec_json))
        self.service = PartitionService(self.link, spec, self.reactor, PartitionCounters())  # type: ignore[arg-type]
        self._address = sim.new_address(host)
        sim.monitor.watch_partition(self)
        life.at_end.append(lambda: sim.monitor.forget_partition(self))

    def begin(self) -> None:
        """Listen, say so, and wait for a plan."""
        self.reactor.listen(self._address, self.service.handler)
        ready = PartitionReady(addresses=[self._address], numerics_class=NUMERICS, numerics_detail="simulated")
        self.link.report(ProcessReport(partition_ready=ready))
        self.service.start()

    def hear_orders(self) -> None:
        """Orders are there."""
        self.service._orders()

    def _stopped(self) -> None:
        if not self._ending:
            self._ending = True
            code = EXIT_FAILED if self.service.failed else 0
            self.life.after(SOON_S, "returns from its reactor", lambda: self._ended(code))
