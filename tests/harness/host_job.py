"""The job that tests on several hosts disturb: slow until the test is done with it, then compared with one machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.host_cluster import HostCluster
from harness.jobs import lm_spec
from harness.paced_task import paced_spec
from pscluster.client import Job

STEPS = 100
HOSTS = 3
SMALL: dict[str, Any] = {"steps": STEPS, "d_model": 64}


@dataclass
class PacedJob:
    """A job with a trainer and a partition on each of three hosts; slow until `hurry`."""

    cluster: HostCluster
    digest: str
    job_id: str = ""

    def submit(self, **changes: Any) -> str:
        """Submit it, and wait until steps are committed on all three hosts."""
        shared = self.cluster.shared
        spec, self._pace = paced_spec(lm_spec(partitions=HOSTS, **SMALL), shared, slow_s=0.15)
        self.job_id = self.cluster.submit(spec | {"workers": {"min": 1, "max": HOSTS}} | changes, shared)
        self.cluster.until(self.job_id, lambda job: job.step >= 3 and job.workers_active == HOSTS)
        return self.job_id

    def advance(self, steps: int = 3) -> None:
        """Wait until so many more steps are committed, with whatever runs."""
        with self.cluster.client() as client:
            step = client.job(self.job_id).step
        self.cluster.until(self.job_id, lambda job: job.step >= step + steps)

    def finish(self) -> list[str]:
        """Let it run to its end; its result must be that of one machine. The reasons of its events."""
        self._pace.unlink()
        self.cluster.wait(self.job_id, "succeeded")
        found = self.cluster.describe(self.job_id)
        assert (found["step"], found["parameters_sha256"]) == (STEPS, self.digest)
        return [event["reason"] for event in found["events"]]

    def until(self, holds: Callable[[Job], bool]) -> Job:
        """The job when this first held; fails when it ends before."""
        return self.cluster.until(self.job_id, holds)

    def until_events(self, *reasons: str, words: str = "") -> Job:
        """The job once it has an event of each of these reasons, with these words in its message."""
        return self.until(lambda job: set(reasons) <= {e.reason for e in job.events if words in e.message})
