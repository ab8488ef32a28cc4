from pscluster.v1 import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PutPartRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: PartHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[PartHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PartHeader(_message.Message):
    __slots__ = ("job_id", "part", "kept_steps")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    KEPT_STEPS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    part: _plan_pb2.SnapshotPart
    kept_steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job_id: _Optional[str] = ..., part: _Optional[_Union[_plan_pb2.SnapshotPart, _Mapping]] = ..., kept_steps: _Optional[_Iterable[int]] = ...) -> None: ...

class PutPartReply(_message.Message):
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
