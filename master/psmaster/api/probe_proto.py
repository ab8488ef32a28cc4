"""A probe's orders, answers and results as protobuf messages and back. Nothing is decided here."""

from __future__ import annotations

from pscluster.rpc.codec import Wire
from pscluster.v1 import plan_pb2, probe_pb2
from psmaster.model.job import ErrorInfo
from psmaster.model.probe import (
    ComputeProbe,
    DeviceFigures,
    PairFigures,
    PairProbe,
    ProbeAnswer,
    ProbeExtent,
    ProbeOrder,
    ProbeResult,
)

_wire = Wire()
_wire.pair(ErrorInfo, plan_pb2.ErrorDetail)
_wire.pair(PairFigures, probe_pb2.PairFigures)
_wire.pair(DeviceFigures, probe_pb2.DeviceFigures)
order = _wire.pair(ProbeOrder, probe_pb2.ProbeOrder).encode
answer = _wire.pair(ProbeAnswer, probe_pb2.ProbeAnswer).decode
_EXTENT = _wire.pair(ProbeExtent, probe_pb2.ProbeExtent)
_PAIR = _wire.pair(PairProbe, probe_pb2.PairProbe)
_COMPUTE = _wire.pair(ComputeProbe, probe_pb2.ComputeProbe)


def result(value: ProbeResult) -> probe_pb2.ProbeResult:
    """What a client receives."""
    match value:
        case ProbeExtent():
            return probe_pb2.ProbeResult(extent=_EXTENT.encode(value))
        case PairProbe():
            return probe_pb2.ProbeResult(pair=_PAIR.encode(value))
        case ComputeProbe():
            return probe_pb2.ProbeResult(compute=_COMPUTE.encode(value))
