"""Drain: the processes of a node move while their job continues, with the same bits and without repeated steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.cluster import LocalCluster, local_cluster, wait_gone
from harness.held_task import held_spec
from harness.jobs import lm_spec
from harness.paced_task import paced_spec
from harness.plain import train_plainly

STEPS = 160


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(spec_of()).digest


def spec_of(**changes: Any) -> dict[str, Any]:
    spec = lm_spec(steps=STEPS, d_model=64, partitions=2)
    return spec | {"workers": {"min": 1, "max": 2}, "durability": {"every_steps": 1000}, "evaluate": {}} | changes


def submit(cluster: LocalCluster, directory: Path, **changes: Any) -> tuple[str, Path]:
    """Submit a job that is slow while the file exists, and wait for its fifth step."""
    paced, pace = paced_spec(spec_of(**changes), directory, slow_s=0.03)
    job = cluster.submit(paced, directory)
    cluster.wait(job, "step=5")
    return job, pace


def node(cluster: LocalCluster, node_id: str) -> dict[str, Any]:
    nodes = json.loads(cluster.psctl("nodes", "-o", "json").stdout)["items"]
    found: dict[str, Any] = next(entry for entry in nodes if entry["node_id"] == node_id)
    return found


def finish(cluster: LocalCluster, job: str, pace: Path, digest: str) -> list[str]:
    """Let the job end, and check that it equals the undisturbed one with each step computed once; the reasons of its
    events."""
    pace.unlink()
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    assert answer["parameters_sha256"] == digest
    with cluster.client() as client:
        steps = [line["step"] for line in client.metrics(job) if "grad_norm" in line]
    assert steps == list(range(1, STEPS + 1))
    reasons = [event["reason"] for event in answer["events"]]
    assert not {"RolledBack", "TrainerLost", "PartitionLost", "Recovered"} & set(reasons), answer["events"]
    return reasons


def test_a_worker_is_drained_and_its_job_goes_on_with_the_others(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job, pace = submit(cluster, tmp_path)
        trainer = cluster.child("worker-1")
        done = cluster.psctl("drain", "worker-1")
        assert done.stdout.strip() == "worker-1"
        wait_gone([trainer])
        drained = node(cluster, "worker-1")
        assert (drained["drain"], drained["processes"], drained["ready"]) == ("drained", [], True)
        assert "yes,drained" in cluster.psctl("nodes").stdout
        assert "TrainerMoved" in finish(cluster, job, pace, digest)


def test_the_only_worker_is_drained_once_another_has_taken_over(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        cluster.psctl("drain", "worker-1")
        job, pace = submit(cluster, tmp_path, workers={"min": 1, "max": 1})
        assert node(cluster, "worker-1")["processes"] == []
        refused = cluster.psctl("drain", "worker-0", "--timeout", "1s", expect=101)
        assert "trainer-0" in refused.stderr
        cluster.psctl("drain", "worker-1", "--undo")
        cluster.psctl("drain", "worker-0")
        answer = cluster.describe(job)
        assert [placement["node_id"] for placement in answer["plan"]["trainers"]] == ["worker-1"]
        assert {"TrainerAdded", "TrainerMoved"} <= set(finish(cluster, job, pace, digest))


def test_servers_are_drained_in_turn_and_no_step_is_computed_again(digest: str, tmp_path: Path) -> None:
    """server-0 has the coordinator at first."""
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job, pace = submit(cluster, tmp_path)
        for victim, other in (("server-0", "server-1"), ("server-1", "server-0")):
            partitions = cluster.daemon(victim).children()
            cluster.psctl("drain", victim)
            wait_gone(partitions)
            assert node(cluster, victim)["drain"] == "drained"
            assert len(node(cluster, other)["processes"]) == 2
            cluster.psctl("drain", victim, "--undo")
            cluster.until(
                job, lambda job: all(condition.status for condition in job.conditions if condition.type == "Ready")
            )
        reasons = finish(cluster, job, pace, digest)
        assert reasons.count("PartitionMoves") == reasons.count("Moved") == 2


def test_a_drain_outlives_the_master_and_is_undone(tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=1) as cluster:
        cluster.psctl("drain", "worker-0")
        cluster.kill(cluster.daemon("master"))
        cluster.up(2, 1)
        assert node(cluster, "worker-0")["drain"] == "drained"
        assert cluster.psctl("drain", "nobody", expect=102).stdout == ""
        cluster.psctl("drain", "worker-0", "--undo")
        assert node(cluster, "worker-0")["drain"] is None


def test_a_worker_told_to_end_hands_its_shards_over_first(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job, pace = submit(cluster, tmp_path)
        agent = cluster.daemon("worker-1")
        agent.terminate()
        wait_gone([agent])
        assert "TrainerMoved" in finish(cluster, job, pace, digest)


def test_the_last_worker_leaves_and_the_job_waits_for_one(tmp_path: Path) -> None:
    plain = lm_spec(steps=30, d_model=64, partitions=2) | {"workers": {"min": 1, "max": 1}}
    digest = train_plainly(plain).digest
    spec, gate = held_spec(plain, tmp_path, free=42)
    with local_cluster(tmp_path, workers=1, servers=2) as cluster:
        job = cluster.submit(spec, tmp_path)
        cluster.wait(job, "step=3")
        agent = cluster.daemon("worker-0")
        agent.terminate()
        wait_gone([agent])
        waiting = cluster.until(job, lambda job: job.reason.startswith("waits for a trainer"))
        assert waiting.state == "RUNNING" and "trainer-0" in waiting.reason
        gate.unlink()
        cluster.up(1, 2)
        cluster.wait(job, "succeeded")
        answer = cluster.describe(job)
        assert answer["parameters_sha256"] == digest
        assert "RolledBack" not in [event["reason"] for event in answer["events"]]
