"""Living trainers and partitions without progress: others take over, and the bits stay the same."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness.cluster import LocalCluster, local_cluster, wait_gone
from harness.jobs import lm_spec
from harness.plain import train_plainly
from harness.stuck_task import stuck_spec
from pscluster.client.records import Job

STEPS = 30
STOP_AT = 5


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec(steps=STEPS, d_model=64)).digest


def slow_spec() -> dict[str, object]:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.04, partitions=2)
    return spec | {"workers": {"min": 1, "max": 2}}


def has_event(reason: str, words: str = "") -> Callable[[Job], bool]:
    def holds(job: Job) -> bool:
        return any(event.reason == reason and words in event.message for event in job.events)

    return holds


def finish(cluster: LocalCluster, job: str, digest: str) -> list[str]:
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    assert answer["parameters_sha256"] == digest
    return [event["reason"] for event in answer["events"]]


def test_a_stopped_trainer_is_replaced_and_taken_back(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        cluster.wait(job, f"step={STOP_AT}")
        stopped = cluster.child("worker-1")
        stopped.send_signal(signal.SIGSTOP)
        found = cluster.until(job, has_event("TrainerSuspect"))
        assert stopped.status() == psutil.STATUS_STOPPED
        cluster.wait(job, f"step={found.step + 2}")
        stopped.send_signal(signal.SIGCONT)
        cluster.until(job, has_event("TrainerBack"))
        reasons = finish(cluster, job, digest)
        assert "TrainerLost" not in reasons
        assert "RolledBack" not in reasons


def test_a_trainer_stuck_in_user_code_is_found_although_it_sends_heartbeats(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        spec, caught = stuck_spec(slow_spec(), tmp_path, free=22)
        job = cluster.submit(spec, tmp_path)
        found = cluster.until(job, has_event("TrainerSuspect", "stalled"))
        assert caught.exists()
        cluster.wait(job, f"step={found.step + 2}")
        caught.unlink()
        cluster.until(job, has_event("TrainerBack"))
        reasons = finish(cluster, job, digest)
        assert "TrainerLost" not in reasons
        assert "RolledBack" not in reasons


def test_a_stopped_partition_is_replaced_and_what_it_does_later_changes_nothing(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        cluster.wait(job, f"step={STOP_AT}")
        stopped = cluster.child("server-0")  # the coordinator
        stopped.send_signal(signal.SIGSTOP)
        cluster.until(job, has_event("PartitionLost"))
        wait_gone([stopped])  # stopped as it is, its agent ends it
        assert {"RolledBack"} <= set(finish(cluster, job, digest))


def test_a_stopped_agent_and_its_partition_change_nothing_when_resumed(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=3) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        cluster.wait(job, f"step={STOP_AT}")
        agent, partition = cluster.daemon("server-1"), cluster.child("server-1")
        for process in (agent, partition):
            process.send_signal(signal.SIGSTOP)
        cluster.until(job, has_event("PartitionLost", "silent"))
        cluster.until(job, has_event("RolledBack"))  # another process has it: now the old owner is resumed
        for process in (partition, agent):
            process.send_signal(signal.SIGCONT)
        wait_gone([partition])
        finish(cluster, job, digest)
