"""Audits: a microbatch is computed twice and changes no bit; one that differs is found, and whose it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.cluster import LocalCluster, local_cluster
from harness.flipped_task import flipped_spec
from harness.jobs import crossed_split, even_split, lm_spec, norm_spec
from harness.plain import train_plainly
from harness.static_job import StaticJob

NUM_SHARDS = 7
STEPS = 10
FLIP_AT = 6  # the version that the step with the flip starts from; the newest snapshot is of step 4 or 5


def small_spec(workers: int) -> dict[str, Any]:
    return lm_spec(steps=STEPS, d_model=64, partitions=2) | {"workers": {"min": workers, "max": workers}}


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(small_spec(1)).digest


# ---- nothing is wrong ----

CASES = [
    (2, "shm", "fp32", "fp32"),
    pytest.param(1, "shm", "fp32", "fp32", marks=pytest.mark.slow),
    pytest.param(3, "shm", "bf16", "bf16", marks=pytest.mark.slow),
    pytest.param(2, "tcp", "fp32", "bf16", marks=pytest.mark.slow),
    pytest.param(3, "unix", "bf16", "fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("workers", "transport", "push", "pull"), CASES)
def test_audits_change_no_bit_and_find_nothing(
    workers: int, transport: str, push: str, pull: str, tmp_path: Path
) -> None:
    spec = lm_spec(steps=STEPS, d_model=64, partitions=2, transport=transport)
    spec["network"] |= {"push_codec": push, "pull_codec": pull}
    plain = train_plainly(spec).digest
    with StaticJob(spec | {"audit": {"share": 1.0}}, workers, tmp_path) as job:
        job.wait_ready()
        job.publish(crossed_split(NUM_SHARDS, workers))
        assert job.wait_finished() == plain
        audits = [record for progress in job.reported("partition-0", "progress") for record in progress.audits]
    assert [(record.step, record.result) for record in audits] == [(step, "equal") for step in range(1, STEPS + 1)]


@pytest.mark.slow
def test_audited_buffers_are_as_without(tmp_path: Path) -> None:
    digests = set()
    for workers, share in ((1, 0.0), (2, 1.0)):
        with StaticJob(norm_spec() | {"audit": {"share": share}}, workers, tmp_path / str(workers)) as job:
            job.wait_ready()
            job.publish(even_split(NUM_SHARDS, workers))
            digests.add(job.wait_finished())
            audits = [record.result for each in job.reported("partition-0", "progress") for record in each.audits]
        assert audits == ["equal"] * (10 if share else 0)
    assert len(digests) == 1


@pytest.mark.slow
def test_shards_that_move_leave_audits_unfinished_and_change_no_bit(tmp_path: Path) -> None:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.02)
    plain = train_plainly(spec).digest
    with StaticJob(spec | {"audit": {"share": 1.0}}, 3, tmp_path) as job:
        job.wait_ready()
        splits = [even_split(NUM_SHARDS, 3), crossed_split(NUM_SHARDS, 3), [[(3, 2)], [(0, 3)], [(5, 2)]]]
        moved = 0
        while not job.reported("partition-0", "finished"):
            job.publish(splits[moved % 3])
            moved += 1
            job.wait(lambda step=job.step: bool(job.reported("partition-0", "finished")) or job.step > step)
        assert job.wait_finished() == plain
        audits = [record for progress in job.reported("partition-0", "progress") for record in progress.audits]
    assert [record.step for record in audits] == list(range(1, STEPS + 1))
    assert {record.result for record in audits} <= {"equal", "unfinished"}


# ---- one bit is wrong ----


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("audits"), workers=3, servers=2) as cluster:
        yield cluster


def submit(cluster: LocalCluster, directory: Path, workers: int, on_mismatch: str, order: str) -> tuple[str, Path]:
    spec, orders = flipped_spec(small_spec(workers), directory, FLIP_AT)
    spec["audit"]["on_mismatch"] = on_mismatch
    (orders / order).touch()
    return cluster.submit(spec, directory), orders


def struck(orders: Path) -> list[str]:
    """The workers whose trainers computed wrong bits."""
    found = sorted(path.stem for path in orders.glob("*.struck"))
    assert found, "the fault did not strike"
    return found


def details(answer: dict[str, Any]) -> dict[str, str]:
    """Of the error, which must say where the flip was."""
    assert answer["error"]["code"] == "PS-3007"
    found: dict[str, str] = answer["error"]["details"]
    assert (found["step"], found["bucket"]) == (str(FLIP_AT + 1), "0")
    return found


def audited(answer: dict[str, Any]) -> tuple[int, int, int]:
    audits = answer["audits"]
    return audits["equal"], audits["differing"], audits["unfinished"]


@pytest.mark.slow
def test_a_clean_job_is_vouched_for(cluster: LocalCluster, digest: str, tmp_path: Path) -> None:
    job = cluster.submit(small_spec(3) | {"audit": {"share": 1.0}}, tmp_path)
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    assert answer["parameters_sha256"] == digest
    assert audited(answer) == (STEPS, 0, 0)
    vouched = {own["node_id"]: own for own in answer["audits"]["vouched"]}
    assert sorted(vouched) == ["worker-0", "worker-1", "worker-2"]
    assert max(own["step"] for own in vouched.values()) == STEPS
    assert not any(own["alone"] for own in vouched.values())
    assert "vouched for up to" in cluster.psctl("describe", job).stdout


@pytest.mark.slow
def test_the_sick_node_is_left_out_and_the_job_ends_with_the_undisturbed_bits(
    cluster: LocalCluster, digest: str, tmp_path: Path
) -> None:
    job, orders = submit(cluster, tmp_path, 3, "exclude", "armed")
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    (sick,) = struck(orders)
    assert answer["parameters_sha256"] == digest
    assert audited(answer)[1] == 1
    events = {event["reason"]: event["message"] for event in answer["events"]}
    assert {"AuditMismatch", "NodeLeftOut", "RolledBack", "Recovered"} <= events.keys()
    assert events["NodeLeftOut"].startswith(f"{sick} is left out")
    assert f"step {FLIP_AT + 1}" in events["NodeLeftOut"]
    assert (orders / "parameter").read_text() in events["AuditMismatch"]
    assert sick not in [trainer["node_id"] for trainer in answer["plan"]["trainers"] if trainer["active"]]


@pytest.mark.parametrize(
    ("workers", "on_mismatch", "order", "kind"),
    [
        (3, "stop", "armed", "node"),
        (3, "exclude", "impure", "code"),
        (2, "stop", "armed", "either"),
        (2, "exclude", "armed", "either"),
        (1, "stop", "armed", "alone"),
    ],
)
@pytest.mark.slow
def test_the_job_stops_and_names_who_may_be_at_fault(
    workers: int, on_mismatch: str, order: str, kind: str, cluster: LocalCluster, tmp_path: Path
) -> None:
    job, orders = submit(cluster, tmp_path, workers, on_mismatch, order)
    cluster.wait(job, "failed")
    answer = cluster.describe(job)
    found = details(answer)
    assert (found["kind"], found["tensor"]) == (kind, (orders / "parameter").read_text())
    assert found["shard"] == json.loads((orders / "shard").read_text()).__str__()
    named = sorted(found["nodes"].split(", "))
    if kind == "node":
        assert named == struck(orders)
    assert set(struck(orders)) <= set(named) and len(named) == {"node": 1, "code": 3, "either": 2, "alone": 1}[kind]
    assert answer["step"] == FLIP_AT, "the step is not committed"
    assert audited(answer)[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_a_warning_is_an_event_and_the_job_goes_on(workers: int, cluster: LocalCluster, tmp_path: Path) -> None:
    job, orders = submit(cluster, tmp_path, workers, "warn", "armed")
    cluster.wait(job, "succeeded")
    answer = cluster.describe(job)
    (message,) = [event["message"] for event in answer["events"] if "PS-3007" in event["message"]]
    assert all(worker in message for worker in struck(orders))
    assert audited(answer) == (STEPS - 1, 1, 0)
