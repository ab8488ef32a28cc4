"""psctl doctor: each check over facts, and the verb over a master in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pscluster.cli.doctor import checks
from pscluster.cli.doctor.checks import CertificateFact, Dialled, Disk, Facts, Finding
from pscluster.client.records import Health, Node
from pscluster.errors import UnreachableError
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import Serving
from tests.unit.cli.test_show import node_message

NOW = 1_700_000_000.0
GIB = 1 << 30
HEALTH = Health(
    healthy=True, problems=(), version="0.1.0", protocol=1, started_s=1.0, metrics_address="", cluster_id="0" * 16,
    secured=True, time_s=NOW, addresses=(), join_addresses=(),
)  # fmt: skip
FACTS = Facts(now_s=NOW, version="0.1.0", hostname="here", address="10.0.0.1:7070", health=HEALTH)


def node(name: str = "worker-0", role: str = "worker", **changes: Any) -> Node:
    fields: dict[str, Any] = {
        "node_id": name, "role": role, "ready": True, "incarnation": "i", "cpu_cores": 1, "memory_bytes": 1,
        "devices": (), "slots": 1, "last_beat_s": NOW, "version": "0.1.0", "hostname": "there", "processes": (),
        "metrics_address": "", "isolation": "uid",
    }  # fmt: skip
    return Node(**{**fields, **changes})


def levels(check: Callable[[Facts], Iterable[Finding]], **changes: Any) -> list[str]:
    """The levels of a check's findings; what is not ok says what to do."""
    found = list(check(replace(FACTS, **changes)))
    assert all(bool(finding.action) == (finding.level != "ok") for finding in found)
    assert all("\n" not in finding.text for finding in found)
    return [finding.level for finding in found]


def test_versions() -> None:
    assert levels(checks.versions, nodes=(node(),)) == ["ok"]
    assert levels(checks.versions, nodes=(node(version="0.2.0"),)) == ["warn"]
    assert levels(checks.versions, health=replace(HEALTH, version="0.2.0")) == ["warn"]
    assert levels(checks.versions, health=None) == []


@pytest.mark.parametrize(
    ("offset_s", "round_trip_s", "level"),
    [(0.5, 0.1, "ok"), (-3.0, 0.1, "warn"), (3.0, 4.0, "ok"), (121.0, 0.0, "fail"), (-500.0, 1.0, "fail")],
)
def test_clock(offset_s: float, round_trip_s: float, level: str) -> None:
    assert levels(checks.clock, clock_offset_s=offset_s, round_trip_s=round_trip_s) == [level]


def test_the_clock_of_a_master_that_does_not_say_is_not_judged() -> None:
    assert levels(checks.clock) == []


def test_heartbeats() -> None:
    assert levels(checks.heartbeats) == ["warn"]
    assert levels(checks.heartbeats, nodes=(node(), node("worker-1"))) == ["ok"]
    silent = (node(), node("worker-1", ready=False), node("worker-2", ready=False, last_beat_s=None))
    assert levels(checks.heartbeats, nodes=silent) == ["fail", "fail"]


def test_addresses() -> None:
    down = Dialled(what="the depot of s", address="10.0.0.3:1", error=UnreachableError("no", action="open the port"))
    up = Dialled(what="the depot of t", address="10.0.0.4:1", error=None)
    assert levels(checks.addresses, dialled=(down, up)) == ["fail", "ok"]
    loopback = node("server-0", "server", depot_address="127.0.0.1:9")
    assert levels(checks.addresses, nodes=(loopback,)) == ["fail"]
    assert levels(checks.addresses, nodes=(loopback,), hostname="there") == []


def test_certificates() -> None:
    fresh = CertificateFact(owner="a", expires_s=NOW + 900, renew_at_s=NOW + 600)
    renewing = CertificateFact(owner="b", expires_s=NOW + 290, renew_at_s=NOW - 10)
    stuck = CertificateFact(owner="c", expires_s=NOW + 100, renew_at_s=NOW - 200)
    over = CertificateFact(owner="d", expires_s=NOW - 1, renew_at_s=NOW - 300)
    authority = CertificateFact(owner="e", expires_s=NOW + 1, renew_at_s=None)
    assert levels(checks.certificates, certificates=(fresh, renewing, authority)) == ["ok"]
    assert levels(checks.certificates, certificates=(stuck, over)) == ["warn", "fail"]


def test_isolation() -> None:
    nodes = (
        node(),
        node("worker-1", isolation="none"),
        node("worker-2", isolation=""),
        node("server-0", "server", isolation=""),
    )
    assert levels(checks.isolation, nodes=nodes) == ["ok", "warn", "warn"]
    assert levels(checks.isolation, nodes=nodes, health=replace(HEALTH, secured=False)) == []


def test_devices() -> None:
    assert levels(checks.devices, nodes=(node(devices=("cuda:0",)), node("worker-1"))) == ["ok"]
    assert levels(checks.devices, nodes=(node(),), gpus_here=1) == ["ok"]
    assert levels(checks.devices, nodes=(node(hostname="here"),), gpus_here=1) == ["warn", "ok"]


@pytest.mark.parametrize(
    ("free", "total", "level"),
    [(50 * GIB, 100 * GIB, "ok"), (5 * GIB, 100 * GIB, "warn"), (GIB, 100 * GIB, "fail"), (GIB // 2, GIB, "fail"),
     (200 * GIB, 4096 * GIB, "ok")],
)  # fmt: skip
def test_disks(free: int, total: int, level: str) -> None:
    assert levels(checks.disks, disks=(Disk(path="/s", purpose="x", free_bytes=free, total_bytes=total),)) == [level]


def test_an_unreachable_master_is_the_first_finding() -> None:
    facts = replace(FACTS, health=None, failure=UnreachableError("nobody"))
    assert [(found.check, found.level) for found in checks.findings(facts)] == [("master", "fail")]


# --- the verb ---


def test_doctor_of_a_well_cluster(run: Psctl, serving: Serving) -> None:
    serving.fake.node_list = [node_message()]
    result = run("doctor", "-o", "json")
    found = {finding["check"]: finding["level"] for finding in json.loads(result.stdout)["findings"]}
    assert found.pop("disk") in ("ok", "warn", "fail")  # of the machine that runs the test
    assert found == {"master": "ok", "versions": "ok", "nodes": "ok", "devices": "ok"}


def test_doctor_exits_5_and_names_what_failed(run: Psctl, serving: Serving) -> None:
    serving.fake.node_list = [node_message(ready=False), node_message("server-0", depot_address="127.0.0.1:1")]
    result = run("doctor")
    assert result.exit_code == 5
    failed = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("fail")]
    assert {"nodes", "addresses"} <= set(failed)
    assert all(" -> " in line for line in result.stdout.splitlines() if not line.startswith("ok"))
    assert "PS-4003" in result.stderr


def test_doctor_without_a_cluster_still_checks_this_host(run_alone: Psctl, tmp_path: Path) -> None:
    result = run_alone("--state-dir", str(tmp_path), "doctor", "-o", "json")
    assert result.exit_code == 5
    found = [(finding["check"], finding["level"]) for finding in json.loads(result.stdout)["findings"]]
    assert found[0] == ("master", "fail")
    assert "disk" in dict(found)
