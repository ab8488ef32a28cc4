"""`psctl nodes --probe` with real daemons: every pair and every worker is measured, beside a job only on request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.cluster import LocalCluster, local_cluster
from harness.held_task import held_spec
from harness.jobs import lm_spec

pytestmark = pytest.mark.slow  # each worker's measurement loads torch

SMALL: dict[str, Any] = {"layers": 1, "d_model": 32, "heads": 2, "context": 8, "vocabulary": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module")
def cluster(root: Path) -> Iterator[LocalCluster]:
    with local_cluster(root, workers=2, servers=2) as cluster:
        yield cluster


def probed(cluster: LocalCluster, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.psctl("nodes", "--probe", "-o", "json", *arguments).stdout)
    return found


def test_every_pair_and_every_worker_is_measured(cluster: LocalCluster) -> None:
    found = probed(cluster)
    assert [(pair["dialer"], pair["listener"]) for pair in found["pairs"]] == [
        ("server-0", "server-1"),
        ("worker-0", "server-0"),
        ("worker-0", "server-1"),
        ("worker-1", "server-0"),
        ("worker-1", "server-1"),
    ]
    for pair in found["pairs"]:
        assert (pair["same_host"], pair["error"]) == (True, None)
        assert min(pair["figures"].values()) > 0
    devices = {node["node_id"]: node["devices"] for node in found["nodes"]}
    assert devices.keys() == {"worker-0", "worker-1"}
    assert all(device["error"] is None and device["flops_per_s"] > 0 for own in devices.values() for device in own)
    assert found["left_out"] == []


def test_beside_a_job_it_must_be_allowed_and_leaves_its_devices_alone(cluster: LocalCluster, root: Path) -> None:
    spec = {**lm_spec(steps=4, **SMALL), "workers": {"max": 1}}
    held, gate = held_spec(spec, root, free=10)
    job = cluster.submit(held, root)
    cluster.wait(job, "running")
    refused = cluster.psctl("nodes", "--probe", expect=1)
    assert (refused.stdout, "PS-1004" in refused.stderr, job in refused.stderr) == ("", True, True)
    found = probed(cluster, "--yes")
    assert sorted(node["busy"] for node in found["nodes"]) == [False, True]
    gate.unlink()
    cluster.wait(job, "succeeded")
