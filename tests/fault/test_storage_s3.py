"""Snapshots in an object store: a job loses a partition, is stopped, resumed, exported and deleted, all through S3."""

from __future__ import annotations

from pathlib import Path

from harness.cluster import local_cluster
from harness.jobs import lm_spec
from harness.plain import train_plainly
from harness.s3 import BUCKET, s3_server

STEPS = 24


def test_a_job_lives_by_its_snapshots_in_s3(tmp_path: Path) -> None:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.1, partitions=2) | {
        "workers": {"min": 1, "max": 2},
        "durability": {"every_steps": 4, "store": f"s3://{BUCKET}/prefix"},
    }
    with s3_server() as s3, local_cluster(tmp_path, workers=2, servers=2, environment=s3.environment) as cluster:
        job = cluster.submit(spec, tmp_path)
        cluster.until(job, lambda told: any(e.reason == "Snapshot" and "step 4 " in e.message for e in told.events))
        cluster.kill(cluster.child("server-1"))
        cluster.until(job, lambda told: any(event.reason == "RolledBack" for event in told.events))
        cluster.psctl("stop", job)
        cluster.psctl("resume", job)
        cluster.wait(job, "succeeded")
        told = cluster.describe(job)
        assert any(
            "went back" in event["message"] and "to the snapshot of step" in event["message"]
            for event in told["events"]
        )
        assert told["parameters_sha256"] == train_plainly(lm_spec(steps=STEPS, d_model=64)).digest
        exported = cluster.psctl("export", job, "-o", str(tmp_path / "model.safetensors"))
        assert told["parameters_sha256"] in exported.stderr
        names = {Path(path).name for path in s3.file_system().find(f"{BUCKET}/prefix/{job}")}
        assert f"step-{STEPS:010d}.manifest" in names
        assert sum(name.endswith(".snapshot") for name in names) <= 2 * 4, "old parts are deleted there too"
        cluster.psctl("delete", job)
        assert s3.file_system().find(f"{BUCKET}/prefix") == []
