"""SIGSTOP past suspicion, then SIGCONT: the job continues without the stopped process, which changes nothing later."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.cluster import LocalCluster, local_cluster, wait_gone
from harness.commits import Commits

STEPS = 60  # of the job in conftest.py
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("stopped"), workers=3, servers=3) as cluster:
        yield cluster


Running = tuple[str, Path]


@pytest.fixture
def running(cluster: LocalCluster, paced: tuple[dict[str, Any], Path], tmp_path: Path) -> Running:
    """A job of two trainers and two partitions in mid-run, with a worker and a server to spare; and its pace."""
    spec, pace = paced
    job = cluster.submit(spec, tmp_path)
    cluster.wait(job, "step=3")
    return job, pace


def placements(cluster: LocalCluster, job: str, kind: str) -> list[str]:
    """The nodes on which the job's trainers or partitions are, by rank."""
    return [placement["node_id"] for placement in cluster.describe(job)["plan"][kind]]


def events(cluster: LocalCluster, job: str, reason: str) -> list[str]:
    return [event["message"] for event in cluster.describe(job)["events"] if event["reason"] == reason]


def stopped(process: psutil.Process) -> psutil.Process:
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + DEADLINE_S
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
    return process


def finish(cluster: LocalCluster, job: str, pace: Path, digest: str) -> dict[str, Any]:
    pace.unlink()
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    assert answer["parameters_sha256"] == digest
    with cluster.client() as client:
        recorded = [line["step"] for line in client.metrics(job) if "loss" in line]
    assert recorded == sorted(set(recorded)), "a step was recorded twice"
    return answer


def test_an_agent_past_suspicion(cluster: LocalCluster, running: Running, digest: str) -> None:
    """Its trainer continues meanwhile, although its shards are assigned to others."""
    job, pace = running
    node = placements(cluster, job, "trainers")[1]
    agent, orphan = stopped(cluster.daemon(node)), cluster.child(node)
    found = cluster.until(job, lambda found: any(event.reason == "TrainerLost" for event in found.events))
    assert any(node in event.message for event in found.events)
    cluster.until(job, lambda found: found.step > 0 and any(event.reason == "Recovered" for event in found.events))
    assert orphan.is_running()
    agent.send_signal(signal.SIGCONT)
    wait_gone([orphan])  # the agent has received that it must no longer run there
    assert node not in placements(cluster, job, "trainers")
    finish(cluster, job, pace, digest)
    with cluster.client() as client:
        assert all(held.ready for held in client.nodes())


def test_a_master_stopped_past_every_timeout_costs_nothing(
    cluster: LocalCluster, running: Running, digest: str
) -> None:
    job, pace = running
    master = stopped(cluster.daemon("master"))
    for _ in instants(6.0):
        assert master.status() == psutil.STATUS_STOPPED
    master.send_signal(signal.SIGCONT)
    answer = finish(cluster, job, pace, digest)
    # It suspected no node of silence, because it was stopped itself. (Shards may have moved because of speed.)
    assert answer["plan"]["restore_generation"] == 1
    assert events(cluster, job, "TrainerLost") + events(cluster, job, "PartitionLost") == []
    commits = Commits(cluster.state_dir, job)
    commits.look()
    assert {commit.step for commit in commits.all} == set(range(1, STEPS + 1))


def test_one_of_many_short_stops_is_no_death(cluster: LocalCluster, running: Running, digest: str) -> None:
    """A slow machine: a trainer, a partition and their agents get a quarter of the CPU time."""
    job, pace = running
    nodes = [placements(cluster, job, kind)[0] for kind in ("trainers", "partitions")]
    processes = [process for node in nodes for process in (cluster.child(node), cluster.daemon(node))]
    stops = 0
    for _ in instants(6.0, every_s=0.3):
        for process in processes:
            stopped(process)
        threading.Event().wait(0.3)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        stops += 1
    assert stops > 6
    answer = finish(cluster, job, pace, digest)
    assert events(cluster, job, "TrainerLost") + events(cluster, job, "PartitionLost") == []
    assert answer["plan"]["restore_generation"] == 1  # shards may have moved because of speed


def instants(duration_s: float, every_s: float = 0.1) -> Iterator[None]:
    """Moments over a duration: how long the fault lasts is what is tested."""
    deadline, tick = time.monotonic() + duration_s, threading.Event()
    while time.monotonic() < deadline:
        yield
        tick.wait(every_s)
