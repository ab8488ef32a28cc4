"""Snapshots in an object store: a job loses a partition, is stopped, resumed, exported and deleted with S3; it
continues while S3 hangs or fails."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from harness.cluster import local_cluster
from harness.jobs import lm_spec
from harness.plain import train_plainly
from harness.s3 import BUCKET, s3_server

STEPS = 24


def test_a_job_uses_its_snapshots_in_s3(tmp_path: Path) -> None:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.1, partitions=2) | {
        "workers": {"min": 1, "max": 2},
        "durability": {"every_steps": 4, "store": f"s3://{BUCKET}/prefix"},
    }
    with s3_server() as s3, local_cluster(tmp_path, workers=2, servers=2, environment=s3.environment) as cluster:
        job = cluster.submit(spec, tmp_path)
        cluster.until(job, lambda answer: any(e.reason == "Snapshot" and "step 4 " in e.message for e in answer.events))
        cluster.kill(cluster.child("server-1"))
        cluster.until(job, lambda answer: any(event.reason == "RolledBack" for event in answer.events))
        cluster.psctl("stop", job)
        cluster.psctl("resume", job)
        cluster.wait(job, "succeeded")
        answer = cluster.describe(job)
        assert any(
            "went back" in event["message"] and "to the snapshot of step" in event["message"]
            for event in answer["events"]
        )
        assert answer["parameters_sha256"] == train_plainly(lm_spec(steps=STEPS, d_model=64)).digest
        exported = cluster.psctl("export", job, "-o", str(tmp_path / "model.safetensors"))
        assert answer["parameters_sha256"] in exported.stderr
        names = {Path(path).name for path in s3.file_system().find(answer["store"].removeprefix("s3://"))}
        assert f"step-{STEPS:010d}.manifest" in names
        assert sum(name.endswith(".snapshot") for name in names) <= 2 * 4, "old parts are deleted there too"
        cluster.psctl("delete", job)
        assert s3.file_system().find(f"{BUCKET}/prefix") == []


def test_training_continues_while_the_store_hangs_and_while_it_fails(tmp_path: Path) -> None:
    steps = 80
    spec = lm_spec(steps=steps, d_model=64, pause_s=0.1, partitions=2) | {
        "workers": {"min": 1, "max": 2},
        "durability": {"every_steps": 4, "store": f"s3://{BUCKET}"},
    }
    with s3_server() as s3, local_cluster(tmp_path, workers=2, servers=2, environment=s3.environment) as cluster:
        job = cluster.submit(spec, tmp_path)
        answer = cluster.until(job, lambda answer: any(event.reason == "Snapshot" for event in answer.events))
        s3.process.send_signal(signal.SIGSTOP)
        cluster.wait(job, f"step={answer.step + 12}")
        assert s3.process.status() == psutil.STATUS_STOPPED
        s3.process.send_signal(signal.SIGCONT)
        s3.lose_bucket()
        answer = cluster.until(
            job, lambda answer: any("cannot write s3://" in event.message for event in answer.events)
        )
        cluster.wait(job, f"step={answer.step + 8}")
        s3.make_bucket()
        cluster.until(
            job, lambda now: any(e.reason == "Snapshot" and int(e.message.split()[4]) > answer.step for e in now.events)
        )
        cluster.wait(job, "succeeded")
        found = cluster.describe(job)
    assert found["parameters_sha256"] == train_plainly(lm_spec(steps=steps, d_model=64)).digest
    assert not {"RolledBack", "PartitionLost", "TrainerLost"} & {event["reason"] for event in found["events"]}
