"""kill -9 of the master at every point around a write: the same jobs, the same state, the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import failing_master
from harness.cluster import LocalCluster, local_cluster
from harness.jobs import lm_spec
from pscluster.errors import UnreachableError

STEPS = 60  # of the job in conftest.py
DEADLINE_S = 60.0
# A turn that stores a submission writes no metrics and cuts none; a rollback does.
AT_SUBMISSION = ("before the transaction", "before its commit", "committed")
AT_ROLLBACK = ("metrics not yet cut", "metrics cut")
AT_STEPS = [point for point in failing_master.POINTS if point not in AT_ROLLBACK]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("failpoints"), workers=2, servers=2) as cluster:
        yield cluster
        for process in failing_master.started:  # of a test that failed
            if process.poll() is None:
                process.kill()


def replaced(cluster: LocalCluster, point: str, count: int, marks: Path) -> subprocess.Popen[bytes]:
    """Kill the master and start one that kills itself at the point."""
    master = cluster.daemons().get("master")
    if master is not None:
        cluster.kill(master)
    return failing_master.start(cluster, point, count, marks / point.replace(" ", "-"))


def until_it_serves(cluster: LocalCluster, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            cluster.client().close()
            return
        except UnreachableError:
            time.sleep(0.05)


def struck(process: subprocess.Popen[bytes], marks: Path, point: str) -> None:
    """Wait until it has killed itself."""
    assert process.wait(DEADLINE_S) == -signal.SIGKILL, point
    assert (marks / point.replace(" ", "-")).exists()


def test_a_submission_is_there_once_or_was_never_acknowledged(cluster: LocalCluster, tmp_path: Path) -> None:
    """The master is killed while it stores the job; psctl retries with the next one, and there is one job."""
    for point in AT_SUBMISSION:
        name = f"submitted-{AT_SUBMISSION.index(point)}"
        spec = lm_spec(steps=1, d_model=32) | {"name": name, "workers": {"min": 9, "max": 9}}
        spec["train"] |= {"global_batch": 32}
        process = replaced(cluster, point, 2, tmp_path)  # the first write is that of its start
        until_it_serves(cluster, process)
        submitting = cluster.start("submit", str(_written(spec, tmp_path, name)))
        struck(process, tmp_path, point)
        cluster.up(2, 2)
        out, answer = submitting.communicate(timeout=DEADLINE_S)
        assert submitting.returncode == 0, answer
        found = [line for line in cluster.psctl("list", "-o", "name").stdout.split() if line.startswith(f"{name}-")]
        assert found == [out.strip()]
        cluster.psctl("stop", out.strip())


def test_a_running_job_does_not_notice_and_a_rollback_is_whole(
    cluster: LocalCluster, paced: tuple[dict[str, Any], Path], digest: str, tmp_path: Path
) -> None:
    spec, pace = paced
    spec["task"]["args"]["slow_s"] = 0.4  # a dozen masters start and end before the last step
    job = cluster.submit(spec, tmp_path)
    cluster.wait(job, "step=2")
    for point in AT_STEPS:
        struck(replaced(cluster, point, 2, tmp_path), tmp_path, point)
    for point in AT_ROLLBACK:
        process = replaced(cluster, point, 1, tmp_path)
        cluster.kill(cluster.child("server-1"))
        struck(process, tmp_path, point)
        cluster.up(2, 2)
        cluster.until(job, lambda found: found.generation > 1 and found.plan is not None and found.state == "RUNNING")
    pace.unlink()
    cluster.up(2, 2)
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    assert answer["parameters_sha256"] == digest
    lines = cluster.psctl("metrics", job, "-o", "csv").stdout.splitlines()
    steps = [int(line.split(",")[0]) for line in lines if line[:1].isdigit()]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))


def _written(spec: dict[str, object], directory: Path, name: str) -> Path:
    path = directory / f"{name}.json"
    path.write_text(json.dumps(spec))
    return path
