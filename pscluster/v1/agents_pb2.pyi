from pscluster.v1 import plan_pb2 as _plan_pb2
from pscluster.v1 import probe_pb2 as _probe_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_WORKER: _ClassVar[Role]
    ROLE_SERVER: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_WORKER: Role
ROLE_SERVER: Role

class Resources(_message.Message):
    __slots__ = ("cpu_cores", "memory_bytes", "devices", "slots")
    CPU_CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    cpu_cores: int
    memory_bytes: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    slots: int
    def __init__(self, cpu_cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ..., slots: _Optional[int] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("node_id", "role", "incarnation", "resources", "version", "protocol", "hostname", "metrics_address", "depot_address", "advertised_host", "isolation", "data_ports")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEPOT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ADVERTISED_HOST_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    DATA_PORTS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    role: Role
    incarnation: str
    resources: Resources
    version: str
    protocol: int
    hostname: str
    metrics_address: str
    depot_address: str
    advertised_host: str
    isolation: str
    data_ports: str
    def __init__(self, node_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., incarnation: _Optional[str] = ..., resources: _Optional[_Union[Resources, _Mapping]] = ..., version: _Optional[str] = ..., protocol: _Optional[int] = ..., hostname: _Optional[str] = ..., metrics_address: _Optional[str] = ..., depot_address: _Optional[str] = ..., advertised_host: _Optional[str] = ..., isolation: _Optional[str] = ..., data_ports: _Optional[str] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("beat_interval_s", "suspicion_s")
    BEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    SUSPICION_S_FIELD_NUMBER: _ClassVar[int]
    beat_interval_s: float
    suspicion_s: float
    def __init__(self, beat_interval_s: _Optional[float] = ..., suspicion_s: _Optional[float] = ...) -> None: ...

class AgentMessage(_message.Message):
    __slots__ = ("sequence", "hello", "beat", "status", "event", "log", "goodbye", "leaving", "probe")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    hello: Hello
    beat: NodeBeat
    status: ProcessStatus
    event: ProcessEvent
    log: LogLines
    goodbye: Goodbye
    leaving: Leaving
    probe: _probe_pb2.ProbeAnswer
    def __init__(self, sequence: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., beat: _Optional[_Union[NodeBeat, _Mapping]] = ..., status: _Optional[_Union[ProcessStatus, _Mapping]] = ..., event: _Optional[_Union[ProcessEvent, _Mapping]] = ..., log: _Optional[_Union[LogLines, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., probe: _Optional[_Union[_probe_pb2.ProbeAnswer, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("node_id", "incarnation", "processes")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: str
    processes: _containers.RepeatedCompositeFieldContainer[ProcessState]
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., processes: _Optional[_Iterable[_Union[ProcessState, _Mapping]]] = ...) -> None: ...

class ProcessState(_message.Message):
    __slots__ = ("status", "ready", "generation")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    status: ProcessStatus
    ready: _plan_pb2.ProcessReport
    generation: int
    def __init__(self, status: _Optional[_Union[ProcessStatus, _Mapping]] = ..., ready: _Optional[_Union[_plan_pb2.ProcessReport, _Mapping]] = ..., generation: _Optional[int] = ...) -> None: ...

class NodeBeat(_message.Message):
    __slots__ = ("sent_s", "memory_available_bytes", "speeds")
    class SpeedsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _plan_pb2.Speed
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_plan_pb2.Speed, _Mapping]] = ...) -> None: ...
    SENT_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPEEDS_FIELD_NUMBER: _ClassVar[int]
    sent_s: float
    memory_available_bytes: int
    speeds: _containers.MessageMap[str, _plan_pb2.Speed]
    def __init__(self, sent_s: _Optional[float] = ..., memory_available_bytes: _Optional[int] = ..., speeds: _Optional[_Mapping[str, _plan_pb2.Speed]] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProcessStatus(_message.Message):
    __slots__ = ("process_id", "phase", "exit_code", "signal", "out_of_memory", "pid", "error", "expected", "suspicion", "unreached", "position")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[ProcessStatus.Phase]
        PHASE_RUNNING: _ClassVar[ProcessStatus.Phase]
        PHASE_EXITED: _ClassVar[ProcessStatus.Phase]
    PHASE_UNSPECIFIED: ProcessStatus.Phase
    PHASE_RUNNING: ProcessStatus.Phase
    PHASE_EXITED: ProcessStatus.Phase
    class Suspicion(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SUSPICION_NONE: _ClassVar[ProcessStatus.Suspicion]
        SUSPICION_SILENT: _ClassVar[ProcessStatus.Suspicion]
        SUSPICION_STALLED: _ClassVar[ProcessStatus.Suspicion]
    SUSPICION_NONE: ProcessStatus.Suspicion
    SUSPICION_SILENT: ProcessStatus.Suspicion
    SUSPICION_STALLED: ProcessStatus.Suspicion
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    SUSPICION_FIELD_NUMBER: _ClassVar[int]
    UNREACHED_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    process_id: str
    phase: ProcessStatus.Phase
    exit_code: int
    signal: int
    out_of_memory: bool
    pid: int
    error: _plan_pb2.ErrorDetail
    expected: bool
    suspicion: ProcessStatus.Suspicion
    unreached: _plan_pb2.Unreached
    position: _plan_pb2.LastPosition
    def __init__(self, process_id: _Optional[str] = ..., phase: _Optional[_Union[ProcessStatus.Phase, str]] = ..., exit_code: _Optional[int] = ..., signal: _Optional[int] = ..., out_of_memory: bool = ..., pid: _Optional[int] = ..., error: _Optional[_Union[_plan_pb2.ErrorDetail, _Mapping]] = ..., expected: bool = ..., suspicion: _Optional[_Union[ProcessStatus.Suspicion, str]] = ..., unreached: _Optional[_Union[_plan_pb2.Unreached, _Mapping]] = ..., position: _Optional[_Union[_plan_pb2.LastPosition, _Mapping]] = ...) -> None: ...

class ProcessEvent(_message.Message):
    __slots__ = ("process_id", "report")
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    process_id: str
    report: _plan_pb2.ProcessReport
    def __init__(self, process_id: _Optional[str] = ..., report: _Optional[_Union[_plan_pb2.ProcessReport, _Mapping]] = ...) -> None: ...

class LogLines(_message.Message):
    __slots__ = ("process_id", "lines", "dropped")
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    process_id: str
    lines: _containers.RepeatedCompositeFieldContainer[LogLine]
    dropped: int
    def __init__(self, process_id: _Optional[str] = ..., lines: _Optional[_Iterable[_Union[LogLine, _Mapping]]] = ..., dropped: _Optional[int] = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("time_s", "stream", "text")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    stream: str
    text: str
    def __init__(self, time_s: _Optional[float] = ..., stream: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class MasterMessage(_message.Message):
    __slots__ = ("assignment", "ack", "probe")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    assignment: Assignment
    ack: Acknowledged
    probe: _probe_pb2.ProbeOrder
    def __init__(self, assignment: _Optional[_Union[Assignment, _Mapping]] = ..., ack: _Optional[_Union[Acknowledged, _Mapping]] = ..., probe: _Optional[_Union[_probe_pb2.ProbeOrder, _Mapping]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("revision", "processes", "depots", "deleted_jobs", "revoked_serials")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    DEPOTS_FIELD_NUMBER: _ClassVar[int]
    DELETED_JOBS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_SERIALS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    processes: _containers.RepeatedCompositeFieldContainer[_plan_pb2.ProcessSpec]
    depots: _containers.RepeatedCompositeFieldContainer[DepotAddress]
    deleted_jobs: _containers.RepeatedScalarFieldContainer[str]
    revoked_serials: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, revision: _Optional[int] = ..., processes: _Optional[_Iterable[_Union[_plan_pb2.ProcessSpec, _Mapping]]] = ..., depots: _Optional[_Iterable[_Union[DepotAddress, _Mapping]]] = ..., deleted_jobs: _Optional[_Iterable[str]] = ..., revoked_serials: _Optional[_Iterable[str]] = ...) -> None: ...

class DepotAddress(_message.Message):
    __slots__ = ("node_id", "address")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    address: str
    def __init__(self, node_id: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Acknowledged(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class DownloadBundleRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class BundleChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class FindUnusedRequest(_message.Message):
    __slots__ = ("bundles", "jobs")
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    bundles: _containers.RepeatedScalarFieldContainer[str]
    jobs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bundles: _Optional[_Iterable[str]] = ..., jobs: _Optional[_Iterable[str]] = ...) -> None: ...

class FindUnusedReply(_message.Message):
    __slots__ = ("bundles", "jobs")
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    bundles: _containers.RepeatedScalarFieldContainer[str]
    jobs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bundles: _Optional[_Iterable[str]] = ..., jobs: _Optional[_Iterable[str]] = ...) -> None: ...
