"""A slow machine: its shards move to the others and back, it is reported, and no bit changes."""

from __future__ import annotations

import re
from pathlib import Path

from harness.cluster import local_cluster
from harness.jobs import lm_spec
from harness.plain import train_plainly
from harness.slow_task import slow_spec
from pscluster.client import Job

STEPS = 240
PACE_S, SLOW_S = 0.03, 0.12


def shards_of(job: Job, node_id: str) -> int:
    assert job.plan is not None
    return sum(
        count for placement in job.plan.trainers if placement.node_id == node_id for _, count in placement.shards
    )


def test_shards_move_away_from_a_slow_worker_and_back(tmp_path: Path) -> None:
    spec = lm_spec(steps=STEPS, d_model=64, partitions=2)
    spec |= {"workers": {"min": 2, "max": 2}, "durability": {"every_steps": 1000}, "evaluate": {}}
    digest = train_plainly(spec).digest
    paced, files = slow_spec(spec, tmp_path, pace_s=PACE_S, worker="worker-1", slow_s=SLOW_S)
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(paced, tmp_path)
        even = cluster.until(job, lambda job: job.plan is not None)
        assert shards_of(even, "worker-1") in (3, 4)
        relieved = cluster.until(job, lambda job: job.plan is not None and shards_of(job, "worker-1") <= 2)
        moves = [event for event in relieved.events if event.reason == "ShardsMoved"]
        assert moves and moves[-1].warning
        assert "on worker-1 takes" in moves[-1].message
        shown = cluster.psctl("describe", job).stdout
        assert re.search(r"trainer-1 +worker-1 .* s, \d\.\dx +shards", shown), shown
        (files / "slow").unlink()
        cluster.until(job, lambda job: job.plan is not None and shards_of(job, "worker-1") >= 3)
        (files / "paced").unlink()
        cluster.wait(job, "succeeded")
        answer = cluster.describe(job)
        assert answer["parameters_sha256"] == digest
        reasons = [event["reason"] for event in answer["events"]]
        assert 2 <= reasons.count("ShardsMoved") <= 6
        assert not {"RolledBack", "TrainerLost", "PartitionLost"} & set(reasons)
