"""Durability `replica` with real processes: any process is killed, no step is repeated or lost, the bits are equal."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.cluster import LocalCluster, local_cluster, wait_gone
from harness.jobs import lm_spec
from harness.plain import train_plainly
from pscluster.client import Job

STEPS = 40


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec(steps=STEPS, d_model=64)).digest


def replicated(pause_s: float = 0.1, **changes: object) -> dict[str, object]:
    """Two partitions with standbys; long enough to be disturbed in the middle. Its one snapshot on the way is never the
    newest step, so that a rollback would be noticed."""
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=pause_s, partitions=2)
    durability = {"tier": "replica", "every_steps": 25}
    return spec | {"workers": {"min": 1, "max": 2}, "durability": durability, **changes}


def in_sync(job: Job, after_step: int = 0) -> bool:
    """Whether every partition has a standby in sync, and steps are committed."""
    plan = job.plan
    placements = plan.partitions if plan is not None else ()
    return (
        bool(placements)
        and job.step > after_step
        and all(s.standby is not None and s.standby.in_sync for s in placements)
    )


def until_in_sync(cluster: LocalCluster, job: str, after_step: int = 0) -> Job:
    return cluster.until(job, lambda found: in_sync(found, after_step))


def process_of(cluster: LocalCluster, addresses: tuple[str, ...]) -> psutil.Process:
    """The partition process that listens there: its environment has the directory of its sockets."""
    directory = str(Path(addresses[0].removeprefix("unix:")).parent)
    record = json.loads((cluster.state_dir / "cluster.json").read_text())
    for daemon in record["daemons"]:
        for child in psutil.Process(daemon["pid"]).children(recursive=True):
            if child.environ().get("PS_SOCKET_DIR") == directory:
                return child
    raise AssertionError(f"no process has {directory}")


def partition(cluster: LocalCluster, job: Job, index: int) -> psutil.Process:
    assert job.plan is not None
    return process_of(cluster, job.plan.partitions[index].addresses)


def standby(cluster: LocalCluster, job: Job, index: int) -> psutil.Process:
    assert job.plan is not None
    found = job.plan.partitions[index].standby
    assert found is not None
    return process_of(cluster, found.addresses)


def finish(cluster: LocalCluster, job: str, digest: str) -> dict[str, Any]:
    """Wait for the end, and check the bits, and that every step is in the record once."""
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    assert answer["parameters_sha256"] == digest
    path = Path(answer["directory"]) / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "grad_norm" in entry]
    assert steps == list(range(1, STEPS + 1))
    return answer


def reasons(answer: dict[str, Any]) -> list[str]:
    return [event["reason"] for event in answer["events"]]


def test_undisturbed_it_is_the_same(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(replicated(), tmp_path)
        found = until_in_sync(cluster, job)
        assert found.plan is not None
        for placement in found.plan.partitions:
            assert placement.standby is not None and placement.standby.node_id != placement.node_id
        text = cluster.psctl("describe", job).stdout
        assert text.count("standby, in sync") == 2
        answer = finish(cluster, job, digest)
        assert not {"RolledBack", "TookOver", "StandbyLost", "PartitionLost"} & set(reasons(answer))


@pytest.mark.parametrize("index", [0, 1])
def test_a_partition_is_killed_and_its_standby_takes_over(index: int, digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(replicated(), tmp_path)
        found = until_in_sync(cluster, job, after_step=3)
        cluster.kill(partition(cluster, found, index))
        again = until_in_sync(cluster, job, after_step=found.step + 1)  # a new standby is placed and gets in sync
        assert again.step < STEPS - 3, "too late to disturb anything"
        cluster.kill(partition(cluster, again, index))
        answer = finish(cluster, job, digest)
        assert reasons(answer).count("TookOver") == 2
        assert "RolledBack" not in reasons(answer)


def test_every_server_agent_is_killed_in_turn(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=3) as cluster:
        job = cluster.submit(replicated(), tmp_path)
        at = 2
        for number in range(3):
            found = until_in_sync(cluster, job, after_step=at)
            at = found.step
            assert found.plan is not None
            name = found.plan.partitions[number % 2].node_id
            cluster.kill(cluster.daemon(name))
            cluster.up(2, 3)
        answer = finish(cluster, job, digest)
        assert reasons(answer).count("TookOver") >= 3
        assert "RolledBack" not in reasons(answer)


def test_a_standby_is_killed_and_training_continues(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(replicated(), tmp_path)
        found = until_in_sync(cluster, job, after_step=3)
        for index in (0, 1):
            cluster.kill(standby(cluster, found, index))
        until_in_sync(cluster, job, after_step=found.step + 1)
        answer = finish(cluster, job, digest)
        assert reasons(answer).count("StandbyLost") == 2
        assert not {"RolledBack", "TookOver", "PartitionLost"} & set(reasons(answer))


def test_partition_and_standby_die_together_and_the_job_goes_back(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(replicated(), tmp_path)
        found = until_in_sync(cluster, job, after_step=3)
        both = [partition(cluster, found, 1), standby(cluster, found, 1)]
        for process in both:
            process.send_signal(signal.SIGSTOP)  # both are noticed at the same time
        for process in both:
            os.kill(process.pid, signal.SIGKILL)
        answer = finish(cluster, job, digest)
        assert {"PartitionLost", "RolledBack"} <= set(reasons(answer))


def test_without_a_second_server_it_is_reported_until_one_joins(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=1) as cluster:
        job = cluster.submit(replicated(), tmp_path)
        found = cluster.until(job, lambda now: now.step > 2)
        assert "runs without standby" in found.reason or "without standby for partition-0" in found.reason
        assert [c.status for c in found.conditions if c.type == "Replicated"] == [False]
        cluster.up(2, 2)
        found = until_in_sync(cluster, job)
        assert [c.status for c in found.conditions if c.type == "Replicated"] == [True]
        assert "without standby" not in found.reason
        cluster.kill(partition(cluster, found, 0))
        answer = finish(cluster, job, digest)
        assert "RolledBack" not in reasons(answer)


def hold(process: psutil.Process, until: Callable[[], object]) -> None:
    """Stop a process, and resume it once the condition holds."""
    process.send_signal(signal.SIGSTOP)
    try:
        until()
    finally:
        if process.is_running():
            process.send_signal(signal.SIGCONT)


def test_a_stopped_standby_is_given_up(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(replicated(), tmp_path)
        found = until_in_sync(cluster, job, after_step=3)
        stopped = standby(cluster, found, 1)

        def given_up() -> None:
            cluster.until(job, lambda now: any(event.reason == "StandbyLost" for event in now.events))

        hold(stopped, given_up)
        answer = finish(cluster, job, digest)
        assert not {"RolledBack", "TookOver", "PartitionLost"} & set(reasons(answer))


@pytest.mark.parametrize("index", [0, 1])
def test_a_stopped_partition_is_replaced_and_ended_when_resumed(index: int, digest: str, tmp_path: Path) -> None:
    """It is stopped past suspicion; when it is resumed, its standby has taken over, and it is ended."""
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(replicated(), tmp_path)
        found = until_in_sync(cluster, job, after_step=3)
        stopped = partition(cluster, found, index)

        def taken_over() -> None:
            cluster.until(job, lambda now: any(event.reason == "TookOver" for event in now.events))

        hold(stopped, taken_over)
        answer = finish(cluster, job, digest)
        wait_gone([stopped])
        assert reasons(answer).count("TookOver") == 1
        assert "RolledBack" not in reasons(answer)
