"""Any process is killed in mid-run: the job ends SUCCEEDED with the bits of the undisturbed plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cluster import LocalCluster, local_cluster, wait_gone
from harness.jobs import lm_spec
from harness.plain import train_plainly

STEPS = 16
KILL_AT = 4


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec(steps=STEPS, d_model=64)).digest


def slow_spec(**changes: object) -> dict[str, object]:
    """Long enough to be disturbed in the middle: each microbatch takes 40 ms more."""
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.04, partitions=2)
    return spec | {"workers": {"min": 1, "max": 2}, **changes}


def finish(cluster: LocalCluster, job: str, digest: str) -> dict[str, object]:
    """Wait for the end, and check that the result is that of the undisturbed job."""
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    assert answer["parameters_sha256"] == digest
    assert answer["step"] == STEPS
    return answer


def reasons(answer: dict[str, object]) -> list[str]:
    events = answer["events"]
    assert isinstance(events, list)
    return [event["reason"] for event in events]


@pytest.mark.slow
def test_a_trainer_is_killed(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        cluster.wait(job, f"step={KILL_AT}")
        cluster.kill(cluster.child("worker-1"))
        answer = finish(cluster, job, digest)
        assert "TrainerLost" in reasons(answer)
        assert "signal 9" in " ".join(event["message"] for event in answer["events"])  # type: ignore[attr-defined]
        assert "RolledBack" not in reasons(answer)


@pytest.mark.slow
def test_a_worker_agent_is_killed_and_its_trainer_dies_with_it(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        cluster.wait(job, f"step={KILL_AT}")
        agent, trainer = cluster.daemon("worker-0"), cluster.child("worker-0")
        cluster.kill(agent)
        wait_gone([trainer])
        answer = finish(cluster, job, digest)
        assert "TrainerLost" in reasons(answer)


def test_a_partition_is_killed(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        cluster.wait(job, f"step={KILL_AT}")
        cluster.kill(cluster.child("server-1"))
        answer = finish(cluster, job, digest)
        assert {"PartitionLost", "RolledBack"} <= set(reasons(answer))
        lines = cluster.psctl("metrics", job, "-o", "json").stdout
        assert lines.count('"loss"') >= STEPS


@pytest.mark.slow
def test_the_master_is_killed_and_steps_go_on_meanwhile(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        cluster.wait(job, f"step={KILL_AT}")
        running = {cluster.child(name).pid for name in ("worker-0", "worker-1", "server-0", "server-1")}
        cluster.kill(cluster.daemon("master"))
        store = next((cluster.state_dir / "master" / "jobs").iterdir()) / "snapshots"
        wait_for_file(store, f"step-{STEPS:010d}*")  # the last step was reached while no master ran
        still = {cluster.child(name).pid for name in ("worker-0", "worker-1", "server-0", "server-1")}
        assert still == running  # read before the master is back: then the job soon ends, and they end too
        cluster.up(2, 2)
        answer = finish(cluster, job, digest)
        assert answer["generation"] == 1  # no process was restarted or moved
        steps = [line for line in cluster.psctl("metrics", job, "-o", "csv").stdout.splitlines() if line[:1].isdigit()]
        assert len(steps) >= STEPS  # the record has what was committed meanwhile


def wait_for_file(directory: Path, pattern: str) -> None:
    """Block until a file appears (by inotify-free polling with a deadline; there is no process to wait for)."""
    import time

    deadline = time.monotonic() + 90
    while not list(directory.glob(pattern)):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.02)
