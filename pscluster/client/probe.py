"""What a probe measured, as plain frozen records, and what of it is out of line. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pscluster.client.records import Record, _wire
from pscluster.errors import PsError
from pscluster.v1 import probe_pb2

MIN_OF_A_KIND = 3
"""Of fewer, none can be called unusual."""
SLOW = 0.5
"""Below this share of the median of its kind a bandwidth, or a device, is out of line."""
DISTANT = 3.0
MIN_DISTANT_S = 0.001
"""Above this many medians of its kind, and this long, a round trip is."""
_NOMINAL_MBIT_PER_S = (10, 100, 1000, 2500, 10_000, 25_000, 40_000, 100_000)
_EFFICIENCY = (0.7, 1.0)
"""What of a link's nominal bandwidth a transfer gets."""


@dataclass(frozen=True, kw_only=True)
class PairFigures(Record):
    """Bytes a second from the dialling node and to it; `round_trip_s` of a small message is the median."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float
    round_trip_p99_s: float


@dataclass(frozen=True, kw_only=True)
class ProbedPair(Record):
    """A worker, or server, that connected to a server. `same_host`: no network lies between them."""

    dialer: str
    listener: str
    same_host: bool
    figures: PairFigures | None
    error: PsError | None


@dataclass(frozen=True, kw_only=True)
class ProbedDevice(Record):
    """Multiplying float32 matrices. `device`: "cpu", with `threads` at once, or "cuda:0"."""

    device: str
    flops_per_s: float
    threads: int
    error: PsError | None


@dataclass(frozen=True, kw_only=True)
class ProbedNode(Record):
    """A worker's devices. `busy`: trainers run there, and nothing was measured."""

    node_id: str
    devices: tuple[ProbedDevice, ...]
    busy: bool
    error: PsError | None


@dataclass(frozen=True, kw_only=True)
class ProbeExtent(Record):
    """What is going to be measured. `left_out`: nodes that are not ready."""

    num_pairs: int
    num_nodes: int
    expected_s: float
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Finding(Record):
    """What is out of line. `subject`: "worker-2 -> server-0", "worker-2 cpu"; `value` and `usual`, the median of its
    kind, are bytes a second, seconds, or operations a second; both are None for what could not be measured."""

    kind: Literal["bandwidth", "latency", "compute", "error"]
    subject: str
    nodes: tuple[str, ...]
    value: float | None
    usual: float | None
    message: str


@dataclass(frozen=True, kw_only=True)
class ProbeReport(Record):
    """All that a probe measured. `out_of_line`: see `findings`."""

    pairs: tuple[ProbedPair, ...]
    nodes: tuple[ProbedNode, ...]
    left_out: tuple[str, ...]
    out_of_line: tuple[Finding, ...]

    @classmethod
    def of(cls, results: Iterable[ProbeExtent | ProbedPair | ProbedNode]) -> ProbeReport:
        """The report of a probe that has ended, sorted by node."""
        got = list(results)
        pairs = [result for result in got if isinstance(result, ProbedPair)]
        nodes = [result for result in got if isinstance(result, ProbedNode)]
        pairs.sort(key=lambda pair: (pair.dialer, pair.listener))
        nodes.sort(key=lambda node: node.node_id)
        left_out = [node_id for result in got if isinstance(result, ProbeExtent) for node_id in result.left_out]
        found = tuple(findings(pairs, nodes))
        return cls(pairs=tuple(pairs), nodes=tuple(nodes), left_out=tuple(left_out), out_of_line=found)


@dataclass(frozen=True)
class _Sample:
    """One figure, and what it is compared with: the others of its kind."""

    kind: Hashable
    subject: str
    nodes: tuple[str, ...]
    value: float


def findings(pairs: Sequence[ProbedPair], nodes: Sequence[ProbedNode]) -> list[Finding]:
    """What could not be measured, or is out of line: less than half of the median of its kind, a round trip more than
    three times the median and than a millisecond; of a kind with three figures at least. Connections are of one kind if
    they have the same direction and both have a network between their ends, or neither has; devices if both are CPUs or
    both are GPUs."""
    return [
        *(_failure(f"{pair.dialer} -> {pair.listener}", (pair.dialer, pair.listener), pair.error) for pair in pairs
          if pair.error is not None),
        *(_slow_link(*found) for found in _below(_links(pairs))),
        *(_distant(*found) for found in _above(_round_trips(pairs))),
        *(_failure(subject, (node_id,), error) for node_id, subject, error in _failed_devices(nodes)),
        *(_slow_device(*found) for found in _below(_devices(nodes))),
    ]  # fmt: skip


def _links(pairs: Iterable[ProbedPair]) -> Iterable[_Sample]:
    for pair in pairs:
        if pair.figures is not None:
            ends, back = (pair.dialer, pair.listener), (pair.listener, pair.dialer)
            yield _Sample(("up", pair.same_host), " -> ".join(ends), ends, pair.figures.up_bytes_per_s)
            yield _Sample(("down", pair.same_host), " -> ".join(back), back, pair.figures.down_bytes_per_s)


def _round_trips(pairs: Iterable[ProbedPair]) -> Iterable[_Sample]:
    for pair in pairs:
        if pair.figures is not None:
            ends = (pair.dialer, pair.listener)
            yield _Sample(pair.same_host, " <-> ".join(ends), ends, pair.figures.round_trip_s)


def _devices(nodes: Iterable[ProbedNode]) -> Iterable[_Sample]:
    for node in nodes:
        for device in node.devices:
            if device.error is None:
                kind = device.device.partition(":")[0]
                yield _Sample(kind, f"{node.node_id} {device.device}", (node.node_id,), device.flops_per_s)


def _failed_devices(nodes: Iterable[ProbedNode]) -> Iterable[tuple[str, str, PsError]]:
    for node in nodes:
        if node.error is not None:
            yield node.node_id, node.node_id, node.error
        for device in node.devices:
            if device.error is not None:
                yield node.node_id, f"{node.node_id} {device.device}", device.error


def _compared(samples: Iterable[_Sample]) -> list[tuple[_Sample, float]]:
    """Each sample of a kind that has enough, with the median of its kind."""
    kinds: dict[Hashable, list[_Sample]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, []).append(sample)
    medians = {kind: statistics.median(sample.value for sample in found) for kind, found in kinds.items()}
    enough = [found for found in kinds.values() if len(found) >= MIN_OF_A_KIND]
    return [(sample, medians[sample.kind]) for found in enough for sample in found]


def _below(samples: Iterable[_Sample]) -> list[tuple[_Sample, float]]:
    return [(sample, usual) for sample, usual in _compared(samples) if sample.value < SLOW * usual]


def _above(samples: Iterable[_Sample]) -> list[tuple[_Sample, float]]:
    return [
        (sample, usual)
        for sample, usual in _compared(samples)
        if sample.value > DISTANT * usual and sample.value > MIN_DISTANT_S
    ]


def _slow_link(sample: _Sample, usual: float) -> Finding:
    nominal = _nominal(sample.value)
    text = f"{_amount(sample.value / 1e6)} MB/s, others {_amount(usual / 1e6)}"
    return _finding("bandwidth", sample, usual, text + (f": a {nominal} link?" if nominal else ""))


def _distant(sample: _Sample, usual: float) -> Finding:
    text = f"a round trip takes {sample.value * 1e3:.2f} ms, others {usual * 1e3:.2f}"
    return _finding("latency", sample, usual, text)


def _slow_device(sample: _Sample, usual: float) -> Finding:
    return _finding("compute", sample, usual, f"{_amount(sample.value / 1e9)} GFLOP/s, others {_amount(usual / 1e9)}")


def _finding(kind: Literal["bandwidth", "latency", "compute"], sample: _Sample, usual: float, text: str) -> Finding:
    return Finding(
        kind=kind,
        subject=sample.subject,
        nodes=sample.nodes,
        value=sample.value,
        usual=usual,
        message=f"{sample.subject}: {text}",
    )


def _failure(subject: str, nodes: tuple[str, ...], error: PsError) -> Finding:
    text = f"{subject}: not measured: {error}"
    return Finding(kind="error", subject=subject, nodes=nodes, value=None, usual=None, message=text)


def _nominal(bytes_per_s: float) -> str:
    """The network link that would give this bandwidth: "100 Mbit/s"; empty when none is near."""
    lowest, highest = _EFFICIENCY
    for nominal in _NOMINAL_MBIT_PER_S:
        if lowest * nominal <= bytes_per_s * 8 / 1e6 <= highest * nominal:
            return f"{nominal / 1000:g} Gbit/s" if nominal >= 1000 else f"{nominal} Mbit/s"
    return ""


def _amount(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


_wire.pair(PairFigures, probe_pb2.PairFigures)
_wire.pair(ProbedDevice, probe_pb2.DeviceFigures)
_EXTENT = _wire.pair(ProbeExtent, probe_pb2.ProbeExtent)
_PAIR = _wire.pair(ProbedPair, probe_pb2.PairProbe)
_NODE = _wire.pair(ProbedNode, probe_pb2.ComputeProbe)


def result_of(m: probe_pb2.ProbeResult) -> ProbeExtent | ProbedPair | ProbedNode | None:
    """The record; None for a kind that this client does not know yet."""
    match m.WhichOneof("body"):
        case "extent":
            return _EXTENT.decode(m.extent)
        case "pair":
            return _PAIR.decode(m.pair)
        case "compute":
            return _NODE.decode(m.compute)
    return None
