"""A node that cannot start processes, as with a full disk: its job moves to another node, or waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.cluster import LocalCluster, local_cluster
from harness.jobs import lm_spec
from harness.plain import train_plainly
from pscluster.cli.local.processes import daemon_dir

SMALL = {"steps": 4, "layers": 1, "d_model": 32, "heads": 2}


@contextmanager
def sick(cluster: LocalCluster, node_id: str) -> Iterator[None]:
    """A node that cannot start processes: their directories cannot be created."""
    jobs = daemon_dir(node_id, cluster.state_dir) / "jobs"
    aside = jobs.rename(jobs.with_name("aside"))
    jobs.touch()
    try:
        yield
    finally:
        jobs.unlink()
        aside.rename(jobs)


def failed_starts(cluster: LocalCluster, job: str, node_id: str) -> int:
    answer = [event["message"] for event in cluster.describe(job)["events"] if event["reason"].endswith("Lost")]
    return sum(f"on {node_id} could not be started: PS-4002" in message for message in answer)


def test_a_job_leaves_a_server_that_cannot_start_processes(tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=1, servers=2) as cluster, sick(cluster, "server-0"):
        job = cluster.submit(lm_spec(**SMALL), tmp_path)
        cluster.wait(job, "succeeded")
        assert failed_starts(cluster, job, "server-0") == 1
        assert cluster.describe(job)["parameters_sha256"] == train_plainly(lm_spec(**SMALL)).digest


def test_a_job_waits_for_the_only_worker_that_cannot_start_processes_for_some_seconds(tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=1, servers=1) as cluster:
        with sick(cluster, "worker-0"):
            job = cluster.submit(lm_spec(**SMALL), tmp_path)
            waits = "trainer-0 on worker-0, attempt 4, which starts 2 s after the last one was lost"
            cluster.until(job, lambda found: waits in found.reason)
        cluster.wait(job, "succeeded")
        assert failed_starts(cluster, job, "worker-0") >= 3
        assert cluster.describe(job)["parameters_sha256"] == train_plainly(lm_spec(**SMALL)).digest
