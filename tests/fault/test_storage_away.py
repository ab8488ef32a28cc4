"""The store is unavailable when the job must go back to its snapshot: the job waits, reports it, and continues."""

from __future__ import annotations

import os
from pathlib import Path

from harness.cluster import local_cluster
from harness.jobs import lm_spec
from harness.plain import train_plainly

STEPS = 24


def test_the_store_comes_back_while_the_job_waits_for_it(tmp_path: Path) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.1, partitions=2) | {
        "workers": {"min": 1, "max": 2},
        "durability": {"every_steps": 4, "store": str(store)},
    }
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(spec, tmp_path)
        cluster.until(job, lambda answer: any(e.reason == "Snapshot" and "step 4 " in e.message for e in answer.events))
        store.rename(away)
        store.touch()  # a file in place of the directory
        cluster.kill(cluster.child("server-1"))
        answer = cluster.until(
            job, lambda answer: any("cannot read" in e.message and e.reason == "Warning" for e in answer.events)
        )
        assert answer.state == "RUNNING"
        os.replace(store, tmp_path / "mistaken")
        away.rename(store)
        cluster.wait(job, "succeeded")
        found = cluster.describe(job)
    assert found["parameters_sha256"] == train_plainly(lm_spec(steps=STEPS, d_model=64)).digest
    reasons = [event["reason"] for event in found["events"]]
    assert reasons.count("RolledBack") == 1 and "SnapshotVoid" not in reasons
    assert sum(reason == "PartitionLost" for reason in reasons) == 1, "waiting is no loss"
