from pscluster.v1 import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProbeOrder(_message.Message):
    __slots__ = ("order_id", "kind", "token", "peer", "address")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[ProbeOrder.Kind]
        KIND_LISTEN: _ClassVar[ProbeOrder.Kind]
        KIND_DIAL: _ClassVar[ProbeOrder.Kind]
        KIND_COMPUTE: _ClassVar[ProbeOrder.Kind]
    KIND_UNSPECIFIED: ProbeOrder.Kind
    KIND_LISTEN: ProbeOrder.Kind
    KIND_DIAL: ProbeOrder.Kind
    KIND_COMPUTE: ProbeOrder.Kind
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    kind: ProbeOrder.Kind
    token: str
    peer: str
    address: str
    def __init__(self, order_id: _Optional[str] = ..., kind: _Optional[_Union[ProbeOrder.Kind, str]] = ..., token: _Optional[str] = ..., peer: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class ProbeAnswer(_message.Message):
    __slots__ = ("order_id", "address", "figures", "devices", "busy", "error")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    address: str
    figures: PairFigures
    devices: _containers.RepeatedCompositeFieldContainer[DeviceFigures]
    busy: bool
    error: _plan_pb2.ErrorDetail
    def __init__(self, order_id: _Optional[str] = ..., address: _Optional[str] = ..., figures: _Optional[_Union[PairFigures, _Mapping]] = ..., devices: _Optional[_Iterable[_Union[DeviceFigures, _Mapping]]] = ..., busy: bool = ..., error: _Optional[_Union[_plan_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class PairFigures(_message.Message):
    __slots__ = ("up_bytes_per_s", "down_bytes_per_s", "round_trip_s", "round_trip_p99_s")
    UP_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DOWN_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_P99_S_FIELD_NUMBER: _ClassVar[int]
    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float
    round_trip_p99_s: float
    def __init__(self, up_bytes_per_s: _Optional[float] = ..., down_bytes_per_s: _Optional[float] = ..., round_trip_s: _Optional[float] = ..., round_trip_p99_s: _Optional[float] = ...) -> None: ...

class DeviceFigures(_message.Message):
    __slots__ = ("device", "flops_per_s", "threads", "error")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FLOPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    device: str
    flops_per_s: float
    threads: int
    error: _plan_pb2.ErrorDetail
    def __init__(self, device: _Optional[str] = ..., flops_per_s: _Optional[float] = ..., threads: _Optional[int] = ..., error: _Optional[_Union[_plan_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("beside_jobs",)
    BESIDE_JOBS_FIELD_NUMBER: _ClassVar[int]
    beside_jobs: bool
    def __init__(self, beside_jobs: bool = ...) -> None: ...

class ProbeResult(_message.Message):
    __slots__ = ("extent", "pair", "compute")
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    PAIR_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    extent: ProbeExtent
    pair: PairProbe
    compute: ComputeProbe
    def __init__(self, extent: _Optional[_Union[ProbeExtent, _Mapping]] = ..., pair: _Optional[_Union[PairProbe, _Mapping]] = ..., compute: _Optional[_Union[ComputeProbe, _Mapping]] = ...) -> None: ...

class ProbeExtent(_message.Message):
    __slots__ = ("num_pairs", "num_nodes", "expected_s", "left_out")
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_S_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    num_pairs: int
    num_nodes: int
    expected_s: float
    left_out: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, num_pairs: _Optional[int] = ..., num_nodes: _Optional[int] = ..., expected_s: _Optional[float] = ..., left_out: _Optional[_Iterable[str]] = ...) -> None: ...

class PairProbe(_message.Message):
    __slots__ = ("dialer", "listener", "same_host", "figures", "error")
    DIALER_FIELD_NUMBER: _ClassVar[int]
    LISTENER_FIELD_NUMBER: _ClassVar[int]
    SAME_HOST_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    dialer: str
    listener: str
    same_host: bool
    figures: PairFigures
    error: _plan_pb2.ErrorDetail
    def __init__(self, dialer: _Optional[str] = ..., listener: _Optional[str] = ..., same_host: bool = ..., figures: _Optional[_Union[PairFigures, _Mapping]] = ..., error: _Optional[_Union[_plan_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class ComputeProbe(_message.Message):
    __slots__ = ("node_id", "devices", "busy", "error")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    devices: _containers.RepeatedCompositeFieldContainer[DeviceFigures]
    busy: bool
    error: _plan_pb2.ErrorDetail
    def __init__(self, node_id: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[DeviceFigures, _Mapping]]] = ..., busy: bool = ..., error: _Optional[_Union[_plan_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...
