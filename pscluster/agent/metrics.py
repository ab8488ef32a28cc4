"""The node's /metrics: the agent's own counters, and the newest counters of its running processes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prometheus_client import Counter, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from pscluster.v1.plan_pb2 import Counters, ProcessSpec

MAX_SAMPLES = 1_000
"""Samples exported of one process: the number of series is bounded."""

_NAME = re.compile(r"[a-z_][a-z0-9_]*")

PROCESSES = Gauge("ps_processes", "Processes of jobs that run on this node.")
STARTED = Counter("ps_processes_started_total", "Processes started.")
EXITS = Counter("ps_process_exits_total", "Processes that ended, by cause.", ["cause"])
SUSPICIONS = Counter("ps_process_suspicions_total", "Times a running process was silent, stalled or cut off.", ["kind"])
LINES_DROPPED = Counter("ps_log_lines_dropped_total", "Lines of output dropped because the backlog was full.")
QUEUED_MESSAGES = Gauge("ps_outbox_messages", "Messages that the master has not acknowledged.")
DROPPED_MESSAGES = Gauge("ps_outbox_dropped", "Messages dropped because the queue was full, since the start.")
MASTER_CONNECTED = Gauge("ps_master_connected", "1 while the stream to the master is open.")

EXIT_CAUSES = ("clean", "expected", "code", "signal", "memory", "not_started")
for _cause in EXIT_CAUSES:
    EXITS.labels(cause=_cause)
for _kind in ("silent", "stalled", "cut off"):
    SUSPICIONS.labels(kind=_kind)


class ProcessMetrics(Collector):
    """Exports `Counters` reports as ps_<name>{job, rank or partition, ...} until the process is dropped."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[dict[str, str], Counters]] = {}

    def keep(self, spec: ProcessSpec, counters: Counters) -> None:
        placement = "rank" if spec.kind == ProcessSpec.KIND_TRAINER else "partition"
        self._held[spec.process_id] = ({"job": spec.job_id, placement: str(spec.rank)}, counters)

    def drop(self, process_id: str) -> None:
        """Stop exporting a process. Safe to repeat."""
        self._held.pop(process_id, None)

    def collect(self) -> Iterable[Metric]:
        """Called on the scrape's thread."""
        families: dict[str, Metric] = {}
        for labels, counters in list(self._held.values()):
            for sample in counters.samples[:MAX_SAMPLES]:
                if not _NAME.fullmatch(sample.name):
                    continue
                name = f"ps_{sample.name}"
                if name not in families:
                    # A counter's family has no suffix in prometheus_client's model; its text format adds it again.
                    family_name = name if sample.gauge else name.removesuffix("_total")
                    kind = "gauge" if sample.gauge else "counter" if name.endswith("_total") else "unknown"
                    families[name] = Metric(family_name, "Reported by a process.", kind)
                families[name].add_sample(name, {**sample.labels, **labels}, sample.value)
        return families.values()
