"""Servers without a shared disk: each part of a snapshot is on two nodes before it counts; one may be lost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from harness.cluster import local_cluster
from harness.jobs import lm_spec
from harness.plain import train_plainly
from pscluster.client import Job

STEPS = 24
OWN = {"PS_OWN_STORE": "true"}


def slow_spec() -> dict[str, object]:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.1, partitions=2)
    return spec | {"workers": {"min": 1, "max": 2}, "durability": {"every_steps": 4}}


def complete(answer: Job, step: int) -> bool:
    return any(e.reason == "Snapshot" and f"step {step} " in e.message for e in answer.events)


def test_a_server_is_lost_with_its_disk(tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=2, servers=3, environment=OWN) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        answer = cluster.until(job, lambda answer: complete(answer, 4))
        assert not list((cluster.state_dir / "master" / "jobs" / job / "snapshots").glob("*.snapshot"))
        with cluster.client() as client:
            snapshot = client.snapshot(job, 4)
        assert answer.plan is not None
        homes = {placement.index: placement.node_id for placement in answer.plan.partitions}
        for part in snapshot.parts:
            assert len(part.nodes) == 2 and part.nodes[0] == homes[part.partition]
            for node_id in part.nodes:
                assert (cluster.state_dir / node_id / "snapshots" / job / part.path).stat().st_size == part.size_bytes

        lost = homes[1]
        disk = cluster.state_dir / lost / "snapshots"
        cluster.kill(cluster.daemon(lost))
        shutil.rmtree(disk)
        answer = cluster.until(job, lambda answer: any(event.reason == "RolledBack" for event in answer.events))
        assert answer.plan is not None
        assert lost not in {placement.node_id for placement in answer.plan.partitions}
        cluster.wait(job, "succeeded")
        found = cluster.describe(job)
        (rolled_back,) = [event["message"] for event in found["events"] if event["reason"] == "RolledBack"]
        assert "snapshot" in rolled_back  # and not to the seed
        assert not any(event["reason"] == "SnapshotVoid" for event in found["events"])
        assert found["parameters_sha256"] == train_plainly(lm_spec(steps=STEPS, d_model=64)).digest
        exported = cluster.psctl("export", job, "-o", str(tmp_path / "model.safetensors"))
        assert found["parameters_sha256"] in exported.stderr
        cluster.psctl("delete", job)
        for node_id in {f"server-{number}" for number in range(3)} - {lost}:
            wait_gone_file(cluster.state_dir / node_id / "snapshots" / job)


def wait_gone_file(path: Path) -> None:
    """Block until a directory is gone; there is no process to wait for."""
    deadline = time.monotonic() + 30
    while path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_nodes_that_are_away_with_their_disks_are_waited_for(tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=1, servers=3, environment=OWN) as cluster:
        job = cluster.submit(slow_spec(), tmp_path)
        cluster.until(job, lambda answer: complete(answer, 8))
        with cluster.client() as client:
            away = next(part.nodes for part in client.snapshot(job, 8).parts if part.partition == 1)
        assert len(away) == 2
        for node_id in away:
            cluster.kill(cluster.daemon(node_id))
        answer = cluster.until(
            job, lambda answer: any("PS-3001" in event.message for event in answer.events)
        )
        assert all(any(f"{node_id}: " in event.message for event in answer.events) for node_id in away)
        cluster.up(workers=1, servers=3)
        cluster.wait(job, "succeeded")
        found = cluster.describe(job)
        reasons = [event["reason"] for event in found["events"]]
        assert "RolledBack" in reasons and "SnapshotVoid" not in reasons
        assert "the seed" not in " ".join(event["message"] for event in found["events"])
        assert found["parameters_sha256"] == train_plainly(lm_spec(steps=STEPS, d_model=64)).digest
