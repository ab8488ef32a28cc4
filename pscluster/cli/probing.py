"""`psctl nodes --probe`: what was measured, and what of it is out of line, for people and programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pscluster.cli import formatting as fmt
from pscluster.cli.output import DOCUMENTS, print_answer, print_document, print_info
from pscluster.cli.session import Session

if TYPE_CHECKING:
    from pscluster.client.probe import ProbedNode, ProbedPair, ProbeExtent, ProbeReport

MAX_COLUMNS = 10
"""More nodes do not fit into a square; then there is a line for each pair."""
_NOT_MEASURED = "failed"


def probe(session: Session, form: str, beside_jobs: bool) -> None:
    """Measure, with a line on stderr for each result, and print the report. Raises StateError while jobs run, unless
    `beside_jobs`."""
    from pscluster.client.probe import ProbeReport

    results = []
    with session.connect() as cluster:
        for result in cluster.probe(beside_jobs=beside_jobs):
            print_info(_line(result))
            results.append(result)
    report = ProbeReport.of(results)
    if form == "name":
        for node_id in sorted({node_id for found in report.out_of_line for node_id in found.nodes}):
            print_answer(node_id)
    elif form in DOCUMENTS:
        print_document("Probe", report.to_dict(), form)
    else:
        print_answer(text(report, wide=form == "wide"))


def text(report: ProbeReport, *, wide: bool) -> str:
    """The tables, then a line for each finding."""
    nodes = sorted({end for pair in report.pairs for end in (pair.dialer, pair.listener)})
    parts = []
    if report.pairs and (wide or len(nodes) > MAX_COLUMNS):
        parts.append(fmt.table(("FROM", "TO", "MB/S", "MB/S-BACK", "MS", "P99-MS"), list(map(_row, report.pairs))))
    elif report.pairs:
        parts += ["MB/s, from the node of the row to that of the column:\n" + _square(report.pairs, nodes, _rates)]
        parts += ["round trip in ms:\n" + _square(report.pairs, nodes, _round_trips)]
    if report.nodes:
        rows = [row for node in report.nodes for row in _devices(node)]
        parts.append(fmt.table(("NODE", "DEVICE", "GFLOP/S", "THREADS"), rows))
    if report.out_of_line:
        parts.append("\n".join(["out of line:", *(f"  {found.message}" for found in report.out_of_line)]))
    else:
        parts.append("nothing is out of line")
    return "\n\n".join(parts)


def _line(result: ProbeExtent | ProbedPair | ProbedNode) -> str:
    from pscluster.client.probe import ProbedPair, ProbeExtent

    if isinstance(result, ProbeExtent):
        left_out = f"; not ready, and left out: {', '.join(result.left_out)}" if result.left_out else ""
        about = fmt.duration(max(1.0, result.expected_s))
        return f"measuring {result.num_pairs} pairs and {result.num_nodes} workers, at most about {about}{left_out}"
    if isinstance(result, ProbedPair):
        start = f"{result.dialer} -> {result.listener}: "
        if result.figures is None:
            return f"{start}{result.error}"
        there, back = _rates(result)
        return f"{start}{there} MB/s, back {back} MB/s, {_round_trips(result)[0]} ms"
    rates = [f"{device} {rate}" for _, device, rate, _ in _devices(result)]
    return f"{result.node_id}: {result.error or ', '.join(rates)}"


def _square(pairs: tuple[ProbedPair, ...], nodes: list[str], values_of: Callable[[ProbedPair], tuple[str, str]]) -> str:
    """A row and a column for each node; `values_of` gives a pair's value from the dialler, and back to it."""
    cells = {}
    for pair in pairs:
        there, back = values_of(pair)
        cells[pair.dialer, pair.listener], cells[pair.listener, pair.dialer] = there, back
    return fmt.table(("", *nodes), [[row, *(cells.get((row, column), "") for column in nodes)] for row in nodes])


def _rates(pair: ProbedPair) -> tuple[str, str]:
    if pair.figures is None:
        return _NOT_MEASURED, _NOT_MEASURED
    return fmt.count(pair.figures.up_bytes_per_s / 1e6), fmt.count(pair.figures.down_bytes_per_s / 1e6)


def _round_trips(pair: ProbedPair) -> tuple[str, str]:
    median = f"{pair.figures.round_trip_s * 1e3:.2f}" if pair.figures is not None else _NOT_MEASURED
    return median, median


def _row(pair: ProbedPair) -> list[str]:
    p99 = f"{pair.figures.round_trip_p99_s * 1e3:.2f}" if pair.figures is not None else _NOT_MEASURED
    return [pair.dialer, pair.listener, *_rates(pair), _round_trips(pair)[0], p99]


def _devices(node: ProbedNode) -> list[list[str]]:
    if not node.devices:
        return [[node.node_id, "", "busy: trainers run" if node.busy else _NOT_MEASURED, ""]]
    return [
        [
            node.node_id,
            device.device,
            fmt.count(device.flops_per_s / 1e9) if device.error is None else _NOT_MEASURED,
            str(device.threads or ""),
        ]
        for device in node.devices
    ]
