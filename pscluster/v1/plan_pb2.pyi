from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShardRange(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class TrainerPlacement(_message.Message):
    __slots__ = ("rank", "node_id", "attempt", "shards", "active", "device", "microbatch_s", "numerics_class")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_S_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_CLASS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node_id: str
    attempt: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardRange]
    active: bool
    device: str
    microbatch_s: float
    numerics_class: str
    def __init__(self, rank: _Optional[int] = ..., node_id: _Optional[str] = ..., attempt: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardRange, _Mapping]]] = ..., active: bool = ..., device: _Optional[str] = ..., microbatch_s: _Optional[float] = ..., numerics_class: _Optional[str] = ...) -> None: ...

class PartitionPlacement(_message.Message):
    __slots__ = ("index", "node_id", "attempt", "addresses", "standby")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    index: int
    node_id: str
    attempt: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    standby: Standby
    def __init__(self, index: _Optional[int] = ..., node_id: _Optional[str] = ..., attempt: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., standby: _Optional[_Union[Standby, _Mapping]] = ...) -> None: ...

class Standby(_message.Message):
    __slots__ = ("node_id", "attempt", "addresses", "in_sync")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    attempt: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    in_sync: bool
    def __init__(self, node_id: _Optional[str] = ..., attempt: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., in_sync: bool = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("job_id", "generation", "trainers", "partitions", "layout_json", "restore_generation", "resume_step", "restore", "stop", "data_token", "kept_steps", "final_step", "moved_generation", "coordinator_generation", "mixed", "save")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TRAINERS_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_JSON_FIELD_NUMBER: _ClassVar[int]
    RESTORE_GENERATION_FIELD_NUMBER: _ClassVar[int]
    RESUME_STEP_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    DATA_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEPT_STEPS_FIELD_NUMBER: _ClassVar[int]
    FINAL_STEP_FIELD_NUMBER: _ClassVar[int]
    MOVED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_GENERATION_FIELD_NUMBER: _ClassVar[int]
    MIXED_FIELD_NUMBER: _ClassVar[int]
    SAVE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    trainers: _containers.RepeatedCompositeFieldContainer[TrainerPlacement]
    partitions: _containers.RepeatedCompositeFieldContainer[PartitionPlacement]
    layout_json: bytes
    restore_generation: int
    resume_step: int
    restore: RestorePoint
    stop: bool
    data_token: bytes
    kept_steps: _containers.RepeatedScalarFieldContainer[int]
    final_step: int
    moved_generation: int
    coordinator_generation: int
    mixed: bool
    save: bool
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ..., trainers: _Optional[_Iterable[_Union[TrainerPlacement, _Mapping]]] = ..., partitions: _Optional[_Iterable[_Union[PartitionPlacement, _Mapping]]] = ..., layout_json: _Optional[bytes] = ..., restore_generation: _Optional[int] = ..., resume_step: _Optional[int] = ..., restore: _Optional[_Union[RestorePoint, _Mapping]] = ..., stop: bool = ..., data_token: _Optional[bytes] = ..., kept_steps: _Optional[_Iterable[int]] = ..., final_step: _Optional[int] = ..., moved_generation: _Optional[int] = ..., coordinator_generation: _Optional[int] = ..., mixed: bool = ..., save: bool = ...) -> None: ...

class RestorePoint(_message.Message):
    __slots__ = ("step", "parts")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    parts: _containers.RepeatedCompositeFieldContainer[SnapshotPart]
    def __init__(self, step: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[SnapshotPart, _Mapping]]] = ...) -> None: ...

class SnapshotPart(_message.Message):
    __slots__ = ("step", "partition", "generation", "path", "size_bytes", "checksum", "nodes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    step: int
    partition: int
    generation: int
    path: str
    size_bytes: int
    checksum: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, step: _Optional[int] = ..., partition: _Optional[int] = ..., generation: _Optional[int] = ..., path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., checksum: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class ProcessSpec(_message.Message):
    __slots__ = ("process_id", "kind", "job_id", "rank", "attempt", "spec_json", "bundle_sha256", "store", "plan", "data_host", "device", "own_store", "scratch_dir", "cache_dir", "credentials", "cluster_id", "data_security", "data_port_first", "data_port_last")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[ProcessSpec.Kind]
        KIND_TRAINER: _ClassVar[ProcessSpec.Kind]
        KIND_PARTITION: _ClassVar[ProcessSpec.Kind]
    KIND_UNSPECIFIED: ProcessSpec.Kind
    KIND_TRAINER: ProcessSpec.Kind
    KIND_PARTITION: ProcessSpec.Kind
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    DATA_HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    OWN_STORE_FIELD_NUMBER: _ClassVar[int]
    SCRATCH_DIR_FIELD_NUMBER: _ClassVar[int]
    CACHE_DIR_FIELD_NUMBER: _ClassVar[int]
    CREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_SECURITY_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIRST_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_LAST_FIELD_NUMBER: _ClassVar[int]
    process_id: str
    kind: ProcessSpec.Kind
    job_id: str
    rank: int
    attempt: int
    spec_json: str
    bundle_sha256: str
    store: str
    plan: Plan
    data_host: str
    device: str
    own_store: bool
    scratch_dir: str
    cache_dir: str
    credentials: Credentials
    cluster_id: str
    data_security: str
    data_port_first: int
    data_port_last: int
    def __init__(self, process_id: _Optional[str] = ..., kind: _Optional[_Union[ProcessSpec.Kind, str]] = ..., job_id: _Optional[str] = ..., rank: _Optional[int] = ..., attempt: _Optional[int] = ..., spec_json: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., store: _Optional[str] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., data_host: _Optional[str] = ..., device: _Optional[str] = ..., own_store: bool = ..., scratch_dir: _Optional[str] = ..., cache_dir: _Optional[str] = ..., credentials: _Optional[_Union[Credentials, _Mapping]] = ..., cluster_id: _Optional[str] = ..., data_security: _Optional[str] = ..., data_port_first: _Optional[int] = ..., data_port_last: _Optional[int] = ...) -> None: ...

class Credentials(_message.Message):
    __slots__ = ("key_pem", "certificate_pem", "authority_pem")
    KEY_PEM_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_PEM_FIELD_NUMBER: _ClassVar[int]
    key_pem: bytes
    certificate_pem: bytes
    authority_pem: bytes
    def __init__(self, key_pem: _Optional[bytes] = ..., certificate_pem: _Optional[bytes] = ..., authority_pem: _Optional[bytes] = ...) -> None: ...

class ProcessReport(_message.Message):
    __slots__ = ("trainer_ready", "partition_ready", "progress", "evaluated", "snapshot_part", "finished", "failure", "counters", "beat", "plan_adopted", "warning", "connected", "standby_state", "audit_mismatch")
    TRAINER_READY_FIELD_NUMBER: _ClassVar[int]
    PARTITION_READY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_PART_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    PLAN_ADOPTED_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    STANDBY_STATE_FIELD_NUMBER: _ClassVar[int]
    AUDIT_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    trainer_ready: TrainerReady
    partition_ready: PartitionReady
    progress: Progress
    evaluated: Evaluated
    snapshot_part: SnapshotPart
    finished: Finished
    failure: Failure
    counters: Counters
    beat: Beat
    plan_adopted: PlanAdopted
    warning: Warning
    connected: Connected
    standby_state: StandbyState
    audit_mismatch: AuditMismatch
    def __init__(self, trainer_ready: _Optional[_Union[TrainerReady, _Mapping]] = ..., partition_ready: _Optional[_Union[PartitionReady, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., evaluated: _Optional[_Union[Evaluated, _Mapping]] = ..., snapshot_part: _Optional[_Union[SnapshotPart, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., plan_adopted: _Optional[_Union[PlanAdopted, _Mapping]] = ..., warning: _Optional[_Union[Warning, _Mapping]] = ..., connected: _Optional[_Union[Connected, _Mapping]] = ..., standby_state: _Optional[_Union[StandbyState, _Mapping]] = ..., audit_mismatch: _Optional[_Union[AuditMismatch, _Mapping]] = ...) -> None: ...

class PreflightCheck(_message.Message):
    __slots__ = ("name", "ok", "detail", "node_id", "warning")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    name: str
    ok: bool
    detail: str
    node_id: str
    warning: bool
    def __init__(self, name: _Optional[str] = ..., ok: bool = ..., detail: _Optional[str] = ..., node_id: _Optional[str] = ..., warning: bool = ...) -> None: ...

class TrainerReady(_message.Message):
    __slots__ = ("layout_json", "layout_sha256", "data_fingerprint", "numerics_class", "numerics_detail", "num_samples", "checks", "device", "final_step", "microbatch_digest")
    LAYOUT_JSON_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_SHA256_FIELD_NUMBER: _ClassVar[int]
    DATA_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_CLASS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DETAIL_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FINAL_STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_DIGEST_FIELD_NUMBER: _ClassVar[int]
    layout_json: bytes
    layout_sha256: str
    data_fingerprint: str
    numerics_class: str
    numerics_detail: str
    num_samples: int
    checks: _containers.RepeatedCompositeFieldContainer[PreflightCheck]
    device: str
    final_step: int
    microbatch_digest: str
    def __init__(self, layout_json: _Optional[bytes] = ..., layout_sha256: _Optional[str] = ..., data_fingerprint: _Optional[str] = ..., numerics_class: _Optional[str] = ..., numerics_detail: _Optional[str] = ..., num_samples: _Optional[int] = ..., checks: _Optional[_Iterable[_Union[PreflightCheck, _Mapping]]] = ..., device: _Optional[str] = ..., final_step: _Optional[int] = ..., microbatch_digest: _Optional[str] = ...) -> None: ...

class PartitionReady(_message.Message):
    __slots__ = ("addresses", "numerics_class", "numerics_detail")
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_CLASS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DETAIL_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    numerics_class: str
    numerics_detail: str
    def __init__(self, addresses: _Optional[_Iterable[str]] = ..., numerics_class: _Optional[str] = ..., numerics_detail: _Optional[str] = ...) -> None: ...

class StepRecord(_message.Message):
    __slots__ = ("step", "loss", "grad_norm", "lr", "weight", "samples", "skipped", "time_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    grad_norm: float
    lr: float
    weight: float
    samples: float
    skipped: bool
    time_s: float
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., grad_norm: _Optional[float] = ..., lr: _Optional[float] = ..., weight: _Optional[float] = ..., samples: _Optional[float] = ..., skipped: bool = ..., time_s: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("generation", "step", "records", "connected_trainers", "held", "audits")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_TRAINERS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    records: _containers.RepeatedCompositeFieldContainer[StepRecord]
    connected_trainers: int
    held: bool
    audits: _containers.RepeatedCompositeFieldContainer[AuditRecord]
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., records: _Optional[_Iterable[_Union[StepRecord, _Mapping]]] = ..., connected_trainers: _Optional[int] = ..., held: bool = ..., audits: _Optional[_Iterable[_Union[AuditRecord, _Mapping]]] = ...) -> None: ...

class AuditRecord(_message.Message):
    __slots__ = ("step", "result", "nodes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    step: int
    result: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, step: _Optional[int] = ..., result: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class AuditMismatch(_message.Message):
    __slots__ = ("generation", "step", "node_id", "error")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    node_id: str
    error: ErrorDetail
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., node_id: _Optional[str] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ...) -> None: ...

class Connected(_message.Message):
    __slots__ = ("connections",)
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    connections: _containers.RepeatedCompositeFieldContainer[Connection]
    def __init__(self, connections: _Optional[_Iterable[_Union[Connection, _Mapping]]] = ...) -> None: ...

class StandbyState(_message.Message):
    __slots__ = ("generation", "attempt", "in_sync", "detail")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    generation: int
    attempt: int
    in_sync: bool
    detail: str
    def __init__(self, generation: _Optional[int] = ..., attempt: _Optional[int] = ..., in_sync: bool = ..., detail: _Optional[str] = ...) -> None: ...

class Connection(_message.Message):
    __slots__ = ("trainer", "partition", "transport")
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    trainer: int
    partition: int
    transport: str
    def __init__(self, trainer: _Optional[int] = ..., partition: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class Evaluated(_message.Message):
    __slots__ = ("generation", "step", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class BestSnapshot(_message.Message):
    __slots__ = ("step", "value")
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    step: int
    value: float
    def __init__(self, step: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("generation", "step", "stopped", "parameters_sha256")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_SHA256_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    stopped: bool
    parameters_sha256: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., stopped: bool = ..., parameters_sha256: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("error", "traceback", "step", "checks", "committed")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    error: ErrorDetail
    traceback: str
    step: int
    checks: _containers.RepeatedCompositeFieldContainer[PreflightCheck]
    committed: int
    def __init__(self, error: _Optional[_Union[ErrorDetail, _Mapping]] = ..., traceback: _Optional[str] = ..., step: _Optional[int] = ..., checks: _Optional[_Iterable[_Union[PreflightCheck, _Mapping]]] = ..., committed: _Optional[int] = ...) -> None: ...

class LastPosition(_message.Message):
    __slots__ = ("activity", "version", "shard", "call", "traceback")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    activity: str
    version: int
    shard: int
    call: str
    traceback: str
    def __init__(self, activity: _Optional[str] = ..., version: _Optional[int] = ..., shard: _Optional[int] = ..., call: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...

class Warning(_message.Message):
    __slots__ = ("error", "step")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    error: ErrorDetail
    step: int
    def __init__(self, error: _Optional[_Union[ErrorDetail, _Mapping]] = ..., step: _Optional[int] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("code", "cause", "action", "details")
    class DetailsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: str
    cause: str
    action: str
    details: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[str] = ..., cause: _Optional[str] = ..., action: _Optional[str] = ..., details: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("samples",)
    class Sample(_message.Message):
        __slots__ = ("name", "labels", "value", "gauge")
        class LabelsEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: str
            def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
        NAME_FIELD_NUMBER: _ClassVar[int]
        LABELS_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        GAUGE_FIELD_NUMBER: _ClassVar[int]
        name: str
        labels: _containers.ScalarMap[str, str]
        value: float
        gauge: bool
        def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., value: _Optional[float] = ..., gauge: bool = ...) -> None: ...
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[Counters.Sample]
    def __init__(self, samples: _Optional[_Iterable[_Union[Counters.Sample, _Mapping]]] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("progress", "speed", "busy_s", "typical_s", "unreached")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_S_FIELD_NUMBER: _ClassVar[int]
    UNREACHED_FIELD_NUMBER: _ClassVar[int]
    progress: int
    speed: Speed
    busy_s: float
    typical_s: float
    unreached: Unreached
    def __init__(self, progress: _Optional[int] = ..., speed: _Optional[_Union[Speed, _Mapping]] = ..., busy_s: _Optional[float] = ..., typical_s: _Optional[float] = ..., unreached: _Optional[_Union[Unreached, _Mapping]] = ...) -> None: ...

class Unreached(_message.Message):
    __slots__ = ("generation", "partitions", "reasons")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    partitions: _containers.RepeatedScalarFieldContainer[int]
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, generation: _Optional[int] = ..., partitions: _Optional[_Iterable[int]] = ..., reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class Speed(_message.Message):
    __slots__ = ("microbatch_s", "microbatches")
    MICROBATCH_S_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    microbatch_s: float
    microbatches: int
    def __init__(self, microbatch_s: _Optional[float] = ..., microbatches: _Optional[int] = ...) -> None: ...

class PlanAdopted(_message.Message):
    __slots__ = ("generation", "step")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class ProcessOrder(_message.Message):
    __slots__ = ("start", "plan", "shutdown", "settled", "credentials")
    START_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    CREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    start: ProcessSpec
    plan: Plan
    shutdown: Shutdown
    settled: PartSettled
    credentials: Credentials
    def __init__(self, start: _Optional[_Union[ProcessSpec, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., shutdown: _Optional[_Union[Shutdown, _Mapping]] = ..., settled: _Optional[_Union[PartSettled, _Mapping]] = ..., credentials: _Optional[_Union[Credentials, _Mapping]] = ...) -> None: ...

class PartSettled(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class Shutdown(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
