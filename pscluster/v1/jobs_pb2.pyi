from pscluster.v1 import agents_pb2 as _agents_pb2
from pscluster.v1 import plan_pb2 as _plan_pb2
from pscluster.v1 import probe_pb2 as _probe_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_STARTING: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_STOPPED: _ClassVar[JobState]
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_STARTING: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_STOPPED: JobState

class Job(_message.Message):
    __slots__ = ("job_id", "name", "state", "reason", "created_s", "started_s", "ended_s", "spec_json", "bundle_sha256", "generation", "step", "final_step", "loss", "steps_per_s", "samples_per_s", "weight_per_s", "workers_active", "workers_wanted", "conditions", "events", "plan", "error", "traceback", "parameters_sha256", "numerics", "metrics", "metrics_step", "best", "store", "directory", "connections", "checks", "revision", "audits", "owner")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_S_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FINAL_STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_PER_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_WANTED_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_SHA256_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    METRICS_STEP_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    name: str
    state: JobState
    reason: str
    created_s: float
    started_s: float
    ended_s: float
    spec_json: str
    bundle_sha256: str
    generation: int
    step: int
    final_step: int
    loss: float
    steps_per_s: float
    samples_per_s: float
    weight_per_s: float
    workers_active: int
    workers_wanted: int
    conditions: _containers.RepeatedCompositeFieldContainer[Condition]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    plan: _plan_pb2.Plan
    error: _plan_pb2.ErrorDetail
    traceback: str
    parameters_sha256: str
    numerics: str
    metrics: _containers.ScalarMap[str, float]
    metrics_step: int
    best: _plan_pb2.BestSnapshot
    store: str
    directory: str
    connections: _containers.RepeatedCompositeFieldContainer[_plan_pb2.Connection]
    checks: _containers.RepeatedCompositeFieldContainer[_plan_pb2.PreflightCheck]
    revision: int
    audits: Audits
    owner: str
    def __init__(self, job_id: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., reason: _Optional[str] = ..., created_s: _Optional[float] = ..., started_s: _Optional[float] = ..., ended_s: _Optional[float] = ..., spec_json: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., final_step: _Optional[int] = ..., loss: _Optional[float] = ..., steps_per_s: _Optional[float] = ..., samples_per_s: _Optional[float] = ..., weight_per_s: _Optional[float] = ..., workers_active: _Optional[int] = ..., workers_wanted: _Optional[int] = ..., conditions: _Optional[_Iterable[_Union[Condition, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., plan: _Optional[_Union[_plan_pb2.Plan, _Mapping]] = ..., error: _Optional[_Union[_plan_pb2.ErrorDetail, _Mapping]] = ..., traceback: _Optional[str] = ..., parameters_sha256: _Optional[str] = ..., numerics: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., metrics_step: _Optional[int] = ..., best: _Optional[_Union[_plan_pb2.BestSnapshot, _Mapping]] = ..., store: _Optional[str] = ..., directory: _Optional[str] = ..., connections: _Optional[_Iterable[_Union[_plan_pb2.Connection, _Mapping]]] = ..., checks: _Optional[_Iterable[_Union[_plan_pb2.PreflightCheck, _Mapping]]] = ..., revision: _Optional[int] = ..., audits: _Optional[_Union[Audits, _Mapping]] = ..., owner: _Optional[str] = ...) -> None: ...

class Audits(_message.Message):
    __slots__ = ("equal", "differing", "unfinished", "vouched")
    EQUAL_FIELD_NUMBER: _ClassVar[int]
    DIFFERING_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    VOUCHED_FIELD_NUMBER: _ClassVar[int]
    equal: int
    differing: int
    unfinished: int
    vouched: _containers.RepeatedCompositeFieldContainer[VouchedNode]
    def __init__(self, equal: _Optional[int] = ..., differing: _Optional[int] = ..., unfinished: _Optional[int] = ..., vouched: _Optional[_Iterable[_Union[VouchedNode, _Mapping]]] = ...) -> None: ...

class VouchedNode(_message.Message):
    __slots__ = ("node_id", "step", "alone")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    step: int
    alone: bool
    def __init__(self, node_id: _Optional[str] = ..., step: _Optional[int] = ..., alone: bool = ...) -> None: ...

class Condition(_message.Message):
    __slots__ = ("type", "status", "reason", "message", "since_s")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    type: str
    status: bool
    reason: str
    message: str
    since_s: float
    def __init__(self, type: _Optional[str] = ..., status: bool = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., since_s: _Optional[float] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("time_s", "reason", "message", "warning")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    reason: str
    message: str
    warning: bool
    def __init__(self, time_s: _Optional[float] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., warning: bool = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("spec_json", "bundle_sha256", "request_id")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    bundle_sha256: str
    request_id: str
    def __init__(self, spec_json: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class HasBundleRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class HasBundleReply(_message.Message):
    __slots__ = ("present",)
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    present: bool
    def __init__(self, present: bool = ...) -> None: ...

class UploadBundleRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: BundleHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[BundleHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class BundleHeader(_message.Message):
    __slots__ = ("sha256", "size_bytes")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size_bytes: int
    def __init__(self, sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class UploadBundleReply(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ReadLogsRequest(_message.Message):
    __slots__ = ("job", "follow", "kind", "rank", "tail", "since_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    follow: bool
    kind: str
    rank: int
    tail: int
    since_s: float
    def __init__(self, job: _Optional[str] = ..., follow: bool = ..., kind: _Optional[str] = ..., rank: _Optional[int] = ..., tail: _Optional[int] = ..., since_s: _Optional[float] = ...) -> None: ...

class LogRecord(_message.Message):
    __slots__ = ("source", "line")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    source: str
    line: _agents_pb2.LogLine
    def __init__(self, source: _Optional[str] = ..., line: _Optional[_Union[_agents_pb2.LogLine, _Mapping]] = ...) -> None: ...

class ReadMetricsRequest(_message.Message):
    __slots__ = ("job", "follow", "from_step")
    JOB_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    follow: bool
    from_step: int
    def __init__(self, job: _Optional[str] = ..., follow: bool = ..., from_step: _Optional[int] = ...) -> None: ...

class MetricsLines(_message.Message):
    __slots__ = ("lines",)
    LINES_FIELD_NUMBER: _ClassVar[int]
    lines: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, lines: _Optional[_Iterable[str]] = ...) -> None: ...

class ListSnapshotsReply(_message.Message):
    __slots__ = ("snapshots",)
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[Snapshot]
    def __init__(self, snapshots: _Optional[_Iterable[_Union[Snapshot, _Mapping]]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("step", "parts", "best")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    step: int
    parts: _containers.RepeatedCompositeFieldContainer[_plan_pb2.SnapshotPart]
    best: bool
    def __init__(self, step: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[_plan_pb2.SnapshotPart, _Mapping]]] = ..., best: bool = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNodesReply(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("node_id", "role", "ready", "incarnation", "resources", "last_beat_s", "version", "hostname", "processes", "metrics_address", "depot_address", "drain", "waits_for", "advertised_host", "isolation", "data_ports")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    LAST_BEAT_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEPOT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    ADVERTISED_HOST_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    DATA_PORTS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    role: _agents_pb2.Role
    ready: bool
    incarnation: str
    resources: _agents_pb2.Resources
    last_beat_s: float
    version: str
    hostname: str
    processes: _containers.RepeatedScalarFieldContainer[str]
    metrics_address: str
    depot_address: str
    drain: str
    waits_for: _containers.RepeatedScalarFieldContainer[str]
    advertised_host: str
    isolation: str
    data_ports: str
    def __init__(self, node_id: _Optional[str] = ..., role: _Optional[_Union[_agents_pb2.Role, str]] = ..., ready: bool = ..., incarnation: _Optional[str] = ..., resources: _Optional[_Union[_agents_pb2.Resources, _Mapping]] = ..., last_beat_s: _Optional[float] = ..., version: _Optional[str] = ..., hostname: _Optional[str] = ..., processes: _Optional[_Iterable[str]] = ..., metrics_address: _Optional[str] = ..., depot_address: _Optional[str] = ..., drain: _Optional[str] = ..., waits_for: _Optional[_Iterable[str]] = ..., advertised_host: _Optional[str] = ..., isolation: _Optional[str] = ..., data_ports: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("node_id", "undo")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    undo: bool
    def __init__(self, node_id: _Optional[str] = ..., undo: bool = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Cluster(_message.Message):
    __slots__ = ("version", "protocol", "healthy", "problems", "started_s", "metrics_address", "cluster_id", "secured", "time_s", "addresses", "join_addresses")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    SECURED_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    JOIN_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol: int
    healthy: bool
    problems: _containers.RepeatedScalarFieldContainer[str]
    started_s: float
    metrics_address: str
    cluster_id: str
    secured: bool
    time_s: float
    addresses: _containers.RepeatedScalarFieldContainer[str]
    join_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., protocol: _Optional[int] = ..., healthy: bool = ..., problems: _Optional[_Iterable[str]] = ..., started_s: _Optional[float] = ..., metrics_address: _Optional[str] = ..., cluster_id: _Optional[str] = ..., secured: bool = ..., time_s: _Optional[float] = ..., addresses: _Optional[_Iterable[str]] = ..., join_addresses: _Optional[_Iterable[str]] = ...) -> None: ...
