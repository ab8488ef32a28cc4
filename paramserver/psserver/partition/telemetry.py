"""What a partition counts; sampled once a second and handed to the agent."""

from __future__ import annotations

from contextlib import AbstractContextManager

from pscluster.agent.link import Phases
from pscluster.errors import PsError
from pscluster.v1.plan_pb2 import Counters
from pscluster.wire.frame import AckResult
from psserver.partition.replication.in_sync import InSyncState

PHASES = ("receive", "sum", "vote", "update", "send", "snapshot")


class PartitionCounters:
    """Absolute values since the start. On the partition's thread."""

    def __init__(self) -> None:
        self.fenced = 0
        self.invalid: dict[str, int] = {}
        self.snapshots = 0
        self.replicated_bytes = 0  # sent to a standby
        self._pushes = dict.fromkeys(AckResult, 0)
        self._push_bytes = 0
        self._phases = Phases(PHASES)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._phases.measure(name)

    def pushed(self, result: AckResult, size_bytes: int) -> None:
        self._pushes[result] += 1
        self._push_bytes += size_bytes

    def sample_standby(self, partition: int, step: int, state_bytes: int) -> Counters:
        """The samples of a standby: none of a partition's, which would count twice."""
        where = {"partition": str(partition)}
        found = {"standby_step": step, "standby_state_bytes": state_bytes}
        samples = [Counters.Sample(name=name, labels=where, value=v, gauge=True) for name, v in found.items()]
        return Counters(samples=samples)

    def refused(self, error: PsError) -> None:
        """A connection was closed because of what came over it."""
        self.invalid[error.code] = self.invalid.get(error.code, 0) + 1

    def sample(
        self,
        partition: int,
        step: int,
        state_bytes: int,
        pull_bytes: int,
        standby: InSyncState | None = None,
        lag: int = 0,
    ) -> Counters:
        """Every counter as the agent exports it, prefix `ps_` and label `job` left out. `standby`: where the job's
        durability asks for one; `lag` in steps."""
        where = {"partition": str(partition)}

        def counter(name: str, value: float, **labels: str) -> Counters.Sample:
            return Counters.Sample(name=name, labels={**where, **labels}, value=value)

        def gauge(name: str, value: float) -> Counters.Sample:
            return Counters.Sample(name=name, labels=where, value=value, gauge=True)

        found = [gauge("step", step), gauge("state_bytes", state_bytes)]
        found += [counter("pushes_total", n, result=result.name.lower()) for result, n in self._pushes.items()]
        found.append(counter("pushes_total", self.fenced, result="fenced"))
        found.append(counter("pushes_total", sum(self.invalid.values()), result="invalid"))
        found += [counter("refused_connections_total", n, code=code) for code, n in sorted(self.invalid.items())]
        found.append(counter("push_bytes_total", self._push_bytes))
        found.append(counter("pull_bytes_total", pull_bytes))
        found.append(counter("snapshots_total", self.snapshots))
        if standby is not None:
            found.append(gauge("replica_in_sync", standby.reported_in_sync))
            found.append(counter("replica_bytes_total", self.replicated_bytes))
            if standby.acked_version >= 0:
                found.append(gauge("replica_lag_steps", lag))
        found += [counter("phase_seconds_total", spent, phase=name) for name, spent in self._phases.seconds.items()]
        return Counters(samples=found)
