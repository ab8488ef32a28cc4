"""Probes: measurements of the network and of nodes' devices that a person asks for. Nothing of them is stored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from psmaster.model.job import ErrorInfo


class OrderKind(StrEnum):
    """What an agent is to do; see ProbeOrder in probe.proto."""

    LISTEN = "listen"
    DIAL = "dial"
    COMPUTE = "compute"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOrder:
    """`token`: for one pair alone. `peer`: the other side's node id. `address`: of a listening peer."""

    kind: OrderKind
    order_id: str = ""  # given when it is sent
    token: str = ""
    peer: str = ""
    address: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFigures:
    """Of a connection, seen from the dialling node; `round_trip_s` is the median."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float
    round_trip_p99_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFigures:
    """Multiplying float32 matrices on "cpu", with `threads` at once, or "cuda:0"; with `error` it was not measured."""

    device: str
    flops_per_s: float
    threads: int
    error: ErrorInfo | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeAnswer:
    """What came of an order: one of the fields but the first is set. `address`: where the node listens now."""

    order_id: str
    address: str = ""
    figures: PairFigures | None = None
    devices: tuple[DeviceFigures, ...] = ()
    busy: bool = False
    error: ErrorInfo | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeExtent:
    """What is going to be measured, and how long that may take. `left_out`: nodes that are not ready."""

    num_pairs: int
    num_nodes: int
    expected_s: float
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairProbe:
    """A worker or server that dialled, and a server that listened: figures, or an error."""

    dialer: str
    listener: str
    same_host: bool
    figures: PairFigures | None = None
    error: ErrorInfo | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeProbe:
    """A worker's devices. `busy`: trainers run there, and nothing was measured."""

    node_id: str
    devices: tuple[DeviceFigures, ...] = ()
    busy: bool = False
    error: ErrorInfo | None = None


ProbeResult = ProbeExtent | PairProbe | ComputeProbe
