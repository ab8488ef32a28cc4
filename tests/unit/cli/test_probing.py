"""`psctl nodes --probe`: what is out of line, and how it reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pscluster.client.probe import Finding, PairFigures, ProbedDevice, ProbedNode, ProbedPair, ProbeReport, findings
from pscluster.errors import PsError, StateError, UnreachableError
from pscluster.v1 import probe_pb2
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster


def pair(
    worker: int, up: float = 110e6, down: float = 110e6, round_trip_s: float = 0.0002, *, same_host: bool = False
) -> ProbedPair:
    figures = PairFigures(
        up_bytes_per_s=up, down_bytes_per_s=down, round_trip_s=round_trip_s, round_trip_p99_s=2 * round_trip_s
    )
    return ProbedPair(dialer=f"worker-{worker}", listener="server-0", same_host=same_host, figures=figures, error=None)


def computed(worker: int, flops_per_s: float, device: str = "cpu") -> ProbedNode:
    measured = ProbedDevice(device=device, flops_per_s=flops_per_s, threads=2, error=None)
    return ProbedNode(node_id=f"worker-{worker}", devices=(measured,), busy=False, error=None)


def named(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.subject) for finding in found]


def test_a_slow_link_is_named_with_what_it_may_be() -> None:
    (found,) = findings([pair(0), pair(1), pair(2, up=11.8e6)], [])
    assert (found.kind, found.subject, found.nodes) == ("bandwidth", "worker-2 -> server-0", ("worker-2", "server-0"))
    assert (found.value, found.usual) == (11.8e6, 110e6)
    assert found.message == "worker-2 -> server-0: 11.8 MB/s, others 110: a 100 Mbit/s link?"


@pytest.mark.parametrize(
    ("rate", "link"), [(1.2e6, "10 Mbit/s"), (117e6, "1 Gbit/s"), (290e6, "2.5 Gbit/s"), (20e6, ""), (60e6, "")]
)
def test_the_link_is_guessed_where_one_is_near(rate: float, link: str) -> None:
    (found,) = findings([pair(0, down=1e9), pair(1, down=1e9), pair(2, down=rate)], [])
    assert found.subject == "server-0 -> worker-2"
    assert found.message.endswith(f": a {link} link?") == bool(link)


def test_directions_are_compared_with_themselves() -> None:
    assert findings([pair(n, up=10e6, down=100e6) for n in range(4)], []) == []


def test_two_are_too_few_to_call_one_slow() -> None:
    assert findings([pair(0), pair(1, up=1e6)], [computed(0, 1e9), computed(1, 1e12)]) == []


def test_half_of_the_median_is_in_line_and_less_is_not() -> None:
    assert findings([pair(0), pair(1), pair(2, up=55e6)], []) == []
    assert named(findings([pair(0), pair(1), pair(2, up=54.9e6)], [])) == [("bandwidth", "worker-2 -> server-0")]


def test_connections_inside_a_host_are_a_kind_of_their_own() -> None:
    pairs = [*(pair(n, up=5e9, down=5e9, same_host=True) for n in range(4)), pair(4), pair(5), pair(6)]
    assert findings(pairs, []) == []


@pytest.mark.parametrize(("round_trip_s", "out"), [(0.00099, False), (0.0011, True)])
def test_a_round_trip_is_long_from_a_millisecond_on(round_trip_s: float, out: bool) -> None:
    found = findings([pair(0), pair(1), pair(2, round_trip_s=round_trip_s)], [])
    assert named(found) == ([("latency", "worker-2 <-> server-0")] if out else [])


def test_a_round_trip_is_long_from_three_medians_on() -> None:
    pairs = [pair(n, round_trip_s=0.02) for n in range(3)]
    assert findings([*pairs, pair(3, round_trip_s=0.059)], []) == []
    assert named(findings([*pairs, pair(3, round_trip_s=0.061)], [])) == [("latency", "worker-3 <-> server-0")]


def test_devices_are_compared_with_devices_of_their_kind() -> None:
    nodes = [computed(0, 120e9), computed(1, 118e9), computed(2, 41e9), computed(3, 5e13, "cuda:0")]
    (found,) = findings([], nodes)
    assert (found.kind, found.subject, found.nodes) == ("compute", "worker-2 cpu", ("worker-2",))


def test_what_was_not_measured_is_named() -> None:
    error: PsError = UnreachableError("no answer in time")
    failed = ProbedPair(dialer="worker-0", listener="server-0", same_host=False, figures=None, error=error)
    busy = ProbedNode(node_id="worker-1", devices=(), busy=True, error=None)
    broken = ProbedDevice(device="cuda:0", flops_per_s=0.0, threads=0, error=error)
    node = ProbedNode(node_id="worker-2", devices=(broken,), busy=False, error=None)
    found = findings([failed], [busy, node])
    assert named(found) == [("error", "worker-0 -> server-0"), ("error", "worker-2 cuda:0")]
    assert all("PS-3001" in finding.message for finding in found)


def test_a_report_is_sorted_and_plain() -> None:
    report = ProbeReport.of([pair(1), computed(1, 1e9), pair(0), computed(0, 1e9)])
    assert [found.dialer for found in report.pairs] == ["worker-0", "worker-1"]
    assert [found.node_id for found in report.nodes] == ["worker-0", "worker-1"]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


# ---- psctl ----


def results(num_workers: int) -> list[probe_pb2.ProbeResult]:
    """Of a cluster whose worker-2 has a slow link, worker-1 a broken one, and where worker-0 is busy."""
    found = [probe_pb2.ProbeResult(extent=probe_pb2.ProbeExtent(num_pairs=num_workers, num_nodes=3, expected_s=50))]
    found[0].extent.left_out.append("worker-99")
    for number in range(num_workers):
        result = probe_pb2.ProbeResult()
        result.pair.dialer, result.pair.listener = f"worker-{number}", "server-0"
        if number == 1:
            result.pair.error.code, result.pair.error.cause = "PS-3001", "connection refused"
        else:
            rate = 11.8e6 if number == 2 else 110e6
            result.pair.figures.CopyFrom(
                probe_pb2.PairFigures(
                    up_bytes_per_s=rate, down_bytes_per_s=112e6, round_trip_s=0.0002, round_trip_p99_s=0.0005
                )
            )
        found.append(result)
    busy = probe_pb2.ComputeProbe(node_id="worker-0", busy=True)
    device = probe_pb2.DeviceFigures(device="cpu", flops_per_s=42e9, threads=8)
    computing = probe_pb2.ComputeProbe(node_id="worker-2", devices=[device])
    return [*found, probe_pb2.ProbeResult(compute=busy), probe_pb2.ProbeResult(compute=computing)]


def test_a_square_of_nodes_and_the_findings(run: Psctl, fake: FakeMaster) -> None:
    fake.probe_results = results(4)
    done = run("nodes", "--probe")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1] == ["server-0", "worker-0", "worker-1", "worker-2", "worker-3"]
    assert ["server-0", "-", "112", "failed", "112", "112"] in lines
    assert ["worker-2", "11.8", "-", "-", "-", "-"] in lines
    assert ["worker-2", "0.20", "-", "-", "-", "-"] in lines
    assert ["worker-0", "-", "busy:", "trainers", "run", "-"] in lines
    assert ["worker-2", "cpu", "42.0", "8"] in lines
    assert "a 100 Mbit/s link?" in done.stdout
    assert "worker-99" in done.stderr
    assert not fake.probe_requests[0].beside_jobs


@pytest.mark.parametrize(("num_workers", "arguments"), [(4, ["-o", "wide"]), (12, [])], ids=["wide", "many"])
def test_a_line_for_each_pair(run: Psctl, fake: FakeMaster, num_workers: int, arguments: list[str]) -> None:
    fake.probe_results = results(num_workers)
    lines = [line.split() for line in run("nodes", "--probe", *arguments).stdout.splitlines()]
    assert lines[0] == ["FROM", "TO", "MB/S", "MB/S-BACK", "MS", "P99-MS"]
    assert ["worker-2", "server-0", "11.8", "112", "0.20", "0.50"] in lines
    assert ["worker-1", "server-0", "failed", "failed", "failed", "failed"] in lines


def test_documents_and_names(run: Psctl, fake: FakeMaster) -> None:
    fake.probe_results = results(4)
    document: dict[str, Any] = json.loads(run("nodes", "--probe", "-o", "json").stdout)
    assert (document["apiVersion"], document["kind"]) == ("ps/v1", "Probe")
    assert document["pairs"][0]["figures"]["up_bytes_per_s"] == 110e6
    assert document["pairs"][1]["error"]["code"] == "PS-3001"
    assert [found["kind"] for found in document["out_of_line"]] == ["error", "bandwidth"]
    assert document["left_out"] == ["worker-99"]
    assert run("nodes", "--probe", "-o", "name").stdout.split() == ["server-0", "worker-1", "worker-2"]


def test_jobs_that_run_must_be_slowed_down_knowingly(run: Psctl, fake: FakeMaster) -> None:
    fake.failures["Probe"] = [StateError("a job runs", action="allow it with --yes")]
    done = run("nodes", "--probe")
    assert done.exit_code == 1
    assert "--yes" in done.stderr
    fake.probe_results = results(1)
    assert run("nodes", "--probe", "--yes").exit_code == 0
    assert fake.probe_requests[-1].beside_jobs
    assert run("nodes", "--yes").exit_code == 2
