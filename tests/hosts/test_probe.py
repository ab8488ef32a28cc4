"""`psctl nodes --probe` over several hosts: measured over TLS between their addresses; a slow link is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness.host_cluster import HostCluster
from harness.hosts import INTERFACE

SLOW = ["rate", "20mbit", "burst", "64kb", "latency", "200ms"]


def probed(cluster: HostCluster) -> dict[str, Any]:
    done = cluster.psctl_on(cluster.network.hosts[0], "nodes", "--probe", "-o", "json", local=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_host_with_a_slow_link_is_named(cluster: HostCluster) -> None:
    slow = cluster.host_of("worker-2")
    added = slow.run("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *SLOW)
    assert added.returncode == 0, added.stderr
    try:
        found = probed(cluster)
    finally:
        slow.run("tc", "qdisc", "del", "dev", INTERFACE, "root")
    assert [pair["error"] for pair in found["pairs"] if pair["error"]] == []
    assert len(found["pairs"]) == 3 * 3 + 3
    same = {(pair["dialer"], pair["listener"]) for pair in found["pairs"] if pair["same_host"]}
    assert same == {(f"worker-{n}", f"server-{n}") for n in range(3)}
    named = {finding["subject"] for finding in found["out_of_line"] if finding["kind"] == "bandwidth"}
    assert named >= {
        *(f"worker-2 -> server-{n}" for n in (0, 1)),
        *(f"server-2 -> {kind}-{n}" for kind in ("worker", "server") for n in (0, 1)),
    }
    assert all(node["devices"][0]["flops_per_s"] > 0 for node in found["nodes"])


@pytest.mark.slow
def test_a_user_may_not_slow_down_the_jobs_of_all(cluster: HostCluster) -> None:
    refused = cluster.psctl("nodes", "--probe", expect=4)
    assert "PS-1005" in refused.stderr
