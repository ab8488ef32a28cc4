"""Trainers that cannot reach a partition but report to the master: others take over, or the partition moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cluster import local_cluster
from harness.cut_task import cut_spec
from harness.jobs import lm_spec
from harness.plain import train_plainly
from pscluster.client import Job

STEPS = 60


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec(steps=STEPS, d_model=64)).digest


def addresses(answer: Job, partition: int) -> str:
    assert answer.plan is not None
    (placement,) = [placement for placement in answer.plan.partitions if placement.index == partition]
    return "\n".join(placement.addresses)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_trainer_is_cut_off_and_comes_back(transport: str, digest: str, tmp_path: Path) -> None:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.05, partitions=2, transport=transport)
    spec, orders = cut_spec({**spec, "workers": {"min": 1, "max": 2}}, tmp_path)
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(spec, tmp_path)
        answer = cluster.until(job, lambda answer: answer.step >= 3)
        order = orders / "worker-1.cut"
        order.write_text(addresses(answer, 1))
        answer = cluster.until(
            job, lambda answer: any("on worker-1 cannot reach partition-1" in e.message for e in answer.events)
        )
        assert order.with_suffix(".struck").exists()
        cluster.wait(job, f"step={answer.step + 3}")
        order.unlink()
        cluster.until(job, lambda answer: any(event.reason == "TrainerBack" for event in answer.events))
        cluster.wait(job, "succeeded")
        found = cluster.describe(job)
    assert found["parameters_sha256"] == digest
    assert not {"TrainerLost", "PartitionLost", "RolledBack"} & {event["reason"] for event in found["events"]}


def test_a_partition_that_no_trainer_reaches_moves_to_another_server(digest: str, tmp_path: Path) -> None:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.05, partitions=2)
    spec, orders = cut_spec({**spec, "workers": {"min": 1, "max": 2}}, tmp_path)
    with local_cluster(tmp_path, workers=2, servers=3) as cluster:
        job = cluster.submit(spec, tmp_path)
        answer = cluster.until(job, lambda answer: answer.step >= 3)
        assert answer.plan is not None
        (home,) = [placement.node_id for placement in answer.plan.partitions if placement.index == 1]
        for worker in ("worker-0", "worker-1"):
            (orders / f"{worker}.cut").write_text(addresses(answer, 1))
        answer = cluster.until(job, lambda answer: any(event.reason == "RolledBack" for event in answer.events))
        assert {path.name for path in orders.glob("*.struck")} == {"worker-0.struck", "worker-1.struck"}
        assert answer.plan is not None
        assert home not in {placement.node_id for placement in answer.plan.partitions}
        cluster.wait(job, "succeeded")
        found = cluster.describe(job)
    assert found["parameters_sha256"] == digest
    lost = [event["message"] for event in found["events"] if event["reason"] == "PartitionLost"]
    assert len(lost) == 1 and f"partition-1 on {home}" in lost[0]
