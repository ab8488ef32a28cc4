from pscluster.v1 import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TakePartRequest(_message.Message):
    __slots__ = ("job_id", "part", "source", "kept_steps")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    KEPT_STEPS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    part: _plan_pb2.SnapshotPart
    source: str
    kept_steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job_id: _Optional[str] = ..., part: _Optional[_Union[_plan_pb2.SnapshotPart, _Mapping]] = ..., source: _Optional[str] = ..., kept_steps: _Optional[_Iterable[int]] = ...) -> None: ...

class TakePartReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPartRequest(_message.Message):
    __slots__ = ("job_id", "part")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    part: _plan_pb2.SnapshotPart
    def __init__(self, job_id: _Optional[str] = ..., part: _Optional[_Union[_plan_pb2.SnapshotPart, _Mapping]] = ...) -> None: ...

class PartChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
