"""The master's metrics, computed from its state at every scrape: what is not there any more has no series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from psmaster.control.loop import ControlLoop
from psmaster.model import membership
from psmaster.model.job import Event, Job, JobState
from psmaster.model.membership import Health, Role
from psmaster.model.plan import ProcessKind
from psmaster.model.state import State
from psmaster.scheduling import rebalance

_LOSSES = {
    "TrainerLost": ProcessKind.TRAINER.value,
    "PartitionLost": ProcessKind.PARTITION.value,
    "StandbyLost": "standby",
}
_GAUGES = (  # of a live job: name, help, field
    ("ps_job_step", "Committed step.", "step"),
    ("ps_job_final_step", "Step at which the job ends; 0 until known.", "final_step"),
    ("ps_job_loss", "Loss of the last committed step.", "loss"),
    ("ps_job_grad_norm", "Gradient norm of the last committed step.", "grad_norm"),
    ("ps_generation", "Generation of the newest plan.", "generation"),
)
_RECOVERY_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)

Family = GaugeMetricFamily | CounterMetricFamily


class MasterMetrics(Collector):
    """Reads the core's newest state, which is immutable, from the endpoint's thread."""

    def __init__(self, core: ControlLoop, metrics: CollectorRegistry = REGISTRY) -> None:
        """Register with `metrics` and listen to `core`; `close` undoes both."""
        self._core = core
        self._registry = metrics
        self._failovers = CounterMetric("ps_failovers_total", "Processes lost.", ["cause"], registry=metrics)
        what = "From a loss to the next committed step."
        self._recovery = Histogram("ps_recovery_seconds", what, ["kind"], buckets=_RECOVERY_BUCKETS, registry=metrics)
        for cause in _LOSSES.values():
            self._failovers.labels(cause=cause)
        for kind in ProcessKind:
            self._recovery.labels(kind=kind.value)
        metrics.register(self)
        core.listeners.append(self.listen)

    def close(self) -> None:
        """Take the metrics back. Safe to call once."""
        self._core.listeners.remove(self.listen)
        for collector in (self, self._failovers, self._recovery):
            self._registry.unregister(collector)

    def listen(self, _state: State, events: tuple[tuple[str, Event], ...]) -> None:
        """Count what happened."""
        for _, event in events:
            if event.reason in _LOSSES:
                self._failovers.labels(cause=_LOSSES[event.reason]).inc()
            elif event.reason == "Recovered":
                self._recovery.labels(kind=event.subject).observe(event.seconds)

    def collect(self) -> Iterator[Family]:
        """Every series of this moment."""
        state = self._core.state
        counts = Counter(job.state for job in state.jobs.values())
        yield _gauge("ps_jobs", "Jobs by state.", ["state"], [([one.value], counts[one]) for one in JobState])
        yield _gauge("ps_queue_depth", "Jobs that wait for their turn.", [], [([], counts[JobState.QUEUED])])
        yield from _of_live_jobs([job for job in state.jobs.values() if not job.state.ended], state)
        yield from self._of_nodes(state)

    def _of_nodes(self, state: State) -> Iterator[Family]:
        now, suspicion_s, nodes = self._core.now(), self._core.limits.suspicion_s, state.nodes.values()
        counts = Counter((node.role, membership.health(node, now.mono_s, suspicion_s)) for node in nodes)
        healths = [([role.value, health.value], counts[role, health]) for role in Role for health in Health]
        yield _gauge("ps_nodes", "Nodes by role and state.", ["role", "state"], healths)
        beats = [([node.node_id, node.role.value], node.last_beat_s) for node in nodes]
        yield _gauge("ps_heartbeat_timestamp_seconds", "Last beat of a node.", ["node", "role"], beats)


def _of_live_jobs(jobs: list[Job], state: State) -> Iterator[Family]:
    for name, help_text, field in _GAUGES:
        yield _gauge(name, help_text, ["job"], [([job.job_id], getattr(job, field)) for job in jobs])
    skipped = CounterMetricFamily("ps_job_nonfinite", "Steps skipped as not finite.", labels=["job"])
    audits = CounterMetricFamily("ps_job_audits", "Audits by result.", labels=["job", "result"])
    trainers: list[tuple[list[str], float]] = []
    ratios: list[tuple[list[str], float]] = []
    for job in jobs:
        skipped.add_metric([job.job_id], job.nonfinite)
        for result in ("equal", "differing", "unfinished"):
            audits.add_metric([job.job_id, result], getattr(job.audits, result))
        active = [placement for placement in job.trainers if placement.active]
        trainers.append(([job.job_id, "active"], len(active)))
        trainers.append(([job.job_id, "waiting"], len(job.trainers) - len(active)))
        speeds = rebalance.measured_speeds(active, job.job_id, state.processes)
        ratios.append(([job.job_id], rebalance.straggler_of(speeds)[1]))
    yield from (skipped, audits)
    yield _gauge("ps_job_trainers", "Trainers by state.", ["job", "state"], trainers)
    what = "Time of the slowest trainer for a microbatch over the median one's."
    yield _gauge("ps_job_straggler_ratio", what, ["job"], ratios)


def _gauge(name: str, help_text: str, labels: list[str], values: Iterable[tuple[list[str], float]]) -> Family:
    """`values`: by the values of the labels."""
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family
