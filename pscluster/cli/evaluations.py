"""The evaluations of a job that is followed: each is printed once, in the order of their steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pscluster.cli import formatting as fmt
from pscluster.errors import NotFoundError

if TYPE_CHECKING:
    from pscluster.client import Cluster, Job, ReconnectingStream


class Evaluations:
    """Reads them from the metrics that the master keeps: a job's state has only the newest, and several may come
    between two states, or with its end. A step that is evaluated again after a rollback has the same values."""

    def __init__(self, cluster: Cluster, stream: ReconnectingStream) -> None:
        from pscluster.client.calls import MetricsCursor

        self._cluster = cluster
        self._stream = stream
        self._printed: int | None = None
        """The last step whose evaluation was printed; None before the first look."""
        self._best: float | None = None
        self._cursor = MetricsCursor()

    def news(self, job: Job) -> list[str]:
        """The lines for the evaluations up to this state of the job that were not returned before.

        Blocks; an unreachable master is waited for as the stream sets. Then it raises UnreachableError."""
        if self._printed is not None and job.metrics_step <= self._printed and not job.ended:
            return []
        after = self._printed or 0
        try:
            records = self._stream.retry(lambda: list(self._cluster.metrics(job.job_id, after, self._cursor)))
        except NotFoundError:
            if not job.ended:
                raise
            records = []  # deleted as soon as it had ended
        lines = [self._line(record, job) for record in records if "eval" in record and record["step"] > after]
        self._printed = max([after, *(record["step"] for record in records if "eval" in record)])
        return lines

    def _line(self, record: Mapping[str, Any], job: Job) -> str:
        values = ", ".join(f"{name} {fmt.number(value)}" for name, value in sorted(record["eval"].items()))
        wanted = job.spec.get("evaluate", {})
        value = record["eval"].get(wanted.get("metric", "loss"))
        best = value is not None and (self._best is None or _is_better(value, self._best, wanted.get("goal", "min")))
        if best:
            self._best = value
        return f"evaluated step {record['step']}: {values}{' (best)' if best else ''}"


def _is_better(value: float, best: float, goal: str) -> bool:
    return value > best if goal == "max" else value < best
