"""A full disk: nothing is acknowledged that was not written, the error is named, and work continues with new space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.cluster import LocalCluster, local_cluster
from harness.disks import MIB, fill, small_disk
from harness.jobs import lm_spec
from harness.plain import train_plainly
from pscluster.client import Job
from pscluster.storage.snapshot import read_part

STEPS = 40
SMALL = {"layers": 1, "d_model": 16, "heads": 2, "vocabulary": 64}


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec(steps=STEPS, **SMALL)).digest


def slow_spec(**durability: object) -> dict[str, object]:
    spec = lm_spec(steps=STEPS, pause_s=0.02, partitions=2, **SMALL)
    return spec | {"workers": {"min": 1, "max": 2}, "durability": {"every_steps": 4, **durability}}


def events(answer: Job, reason: str) -> list[str]:
    return [event.message for event in answer.events if event.reason == reason]


def test_the_store_of_the_snapshots_is_full_for_a_while(digest: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "store") as store, local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(store=str(store)), tmp_path)
        cluster.until(job, lambda answer: bool(events(answer, "Snapshot")) and answer.step >= 4)
        ballast = fill(store)  # asserts that the disk returned ENOSPC
        answer = cluster.until(job, lambda answer: any("No space left" in text for text in events(answer, "Warning")))
        (warning, *_) = [text for text in events(answer, "Warning") if "No space left" in text]
        assert "PS-4002" in warning and "free space" in warning
        parts = list(store.glob(f"*/{job}/step-*.snapshot"))
        assert parts and all(read_part(part) for part in parts), "nothing is there in halves"
        before = set(events(answer, "Snapshot"))
        ballast.unlink()
        cluster.until(job, lambda answer: not before.issuperset(events(answer, "Snapshot")))
        cluster.wait(job, "succeeded")
        assert cluster.describe(job)["parameters_sha256"] == digest


def test_the_masters_disk_is_full_for_a_while(digest: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 16 * MIB) as disk:
        with local_cluster(tmp_path, workers=2, servers=2, master_dir=disk) as cluster:
            store = tmp_path / "store"
            job = cluster.submit(slow_spec(store=str(store)), tmp_path)
            cluster.wait(job, "step=3")
            ballast = fill(disk)
            refused = cluster.psctl("submit", str(spec_file(tmp_path)), expect=None)
            assert refused.returncode == 1
            assert "PS-4002" in refused.stderr and "free space" in refused.stderr
            assert refused.stdout == "", "no id of a job that was not stored"
            cluster.kill(cluster.daemon("master"))  # what it had not written it has not acknowledged
            ballast.unlink()
            cluster.up(2, 2)
            assert [found["job_id"] for found in listed(cluster)] == [job]
            second = cluster.psctl("submit", str(spec_file(tmp_path))).stdout.strip()
            for name in (job, second):
                cluster.wait(name, "succeeded")
                assert cluster.describe(name)["parameters_sha256"] == digest


def spec_file(directory: Path) -> Path:
    path = directory / "spec.json"
    path.write_text(json.dumps(slow_spec()))
    return path


def listed(cluster: LocalCluster) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(cluster.psctl("list", "-o", "json").stdout)["items"]
    return found
