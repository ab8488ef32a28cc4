"""What a task writes: no other job sees it, and the node does not keep it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.cluster import LocalCluster, local_cluster
from harness.own_files_task import own_files_spec
from pscluster.job.bundle import Bundle, pack
from pscluster.job.spec import parse_spec

WITHIN_S = 60.0
pytestmark = pytest.mark.slow  # one cluster and two jobs for all of them


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster"), workers=2, servers=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def jobs(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same job on one worker, on two, and on one again, one after the other."""
    root = tmp_path_factory.mktemp("code")
    specs = [parse_spec(own_files_spec(root, workers)) for workers in (1, 2, 1)]
    bundle: Bundle = pack(root)
    found = []
    for spec in specs:
        with cluster.client() as client:
            found.append(client.submit(spec, bundle))
        cluster.wait(found[-1], "succeeded")
    return found


def printed(cluster: LocalCluster, job: str, word: str) -> list[str]:
    """The lines of a job's output that begin with a word, without their source."""
    texts = [line.partition(" | ")[2] for line in cluster.psctl("logs", job).stdout.splitlines()]
    return [text for text in texts if text.startswith(word)]


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_job_that_runs_again_gives_the_same_bits(cluster: LocalCluster, jobs: list[str]) -> None:
    digests = {cluster.describe(job)["parameters_sha256"] for job in jobs}
    assert len(digests) == 1


def test_every_process_begins_with_the_submitted_files_alone(cluster: LocalCluster, jobs: list[str]) -> None:
    assert [line for job in jobs for line in printed(cluster, job, "listed")] == ["listed data own_files_task.py"] * 4


def test_the_cache_is_the_nodes_and_lasts(cluster: LocalCluster, jobs: list[str]) -> None:
    assert printed(cluster, jobs[0], "cached") == ["cached False"]
    assert "cached True" in printed(cluster, jobs[1], "cached")
    caches = [path / "cache" / "download" for path in cluster.state_dir.glob("worker-*")]
    assert {path.read_text() for path in caches} == {"the same for everyone"}


def test_the_tools_see_the_same(cluster: LocalCluster, jobs: list[str]) -> None:
    wanted = cluster.describe(jobs[0])["metrics"]
    for _ in range(2):
        assert json.loads(cluster.psctl("eval", jobs[0], "-o", "json").stdout)["metrics"] == wanted
    assert (cluster.state_dir / "cache" / "download").exists()


def test_working_and_scratch_directories_end_with_the_job(cluster: LocalCluster, jobs: list[str]) -> None:
    kept = {path for kind in ("jobs", "scratch") for path in cluster.state_dir.glob(f"*-*/{kind}/*")}
    eventually(lambda: not any(path.exists() for path in kept), f"{jobs} left {kept}")


def test_bundles_go_with_the_last_job_that_has_them(cluster: LocalCluster, jobs: list[str]) -> None:
    def archives() -> list[Path]:
        return [path for path in cluster.state_dir.glob("*/bundles/*") if path.is_file()]

    assert {path.parents[1].name for path in archives()} == {"master", "worker-0", "worker-1"}
    with cluster.client() as client:
        for job in jobs:
            client.delete(job)
    eventually(lambda: not archives(), f"{archives()} are kept")
