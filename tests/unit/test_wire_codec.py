"""Dataclasses to messages and back: what corresponds, and what is refused when a pair is made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest

from pscluster.rpc.codec import Wire
from pscluster.v1 import agents_pb2, jobs_pb2, plan_pb2


@dataclass(frozen=True, kw_only=True)
class Part:
    step: int
    partition: int
    generation: int
    path: str
    size_bytes: int
    checksum: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Point:
    step: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Trainer:
    rank: int
    node_id: str
    attempt: int
    shards: tuple[tuple[int, int], ...]
    active: bool
    device: str | None
    microbatch_s: float | None


@dataclass(frozen=True, kw_only=True)
class Cut:
    generation: int
    partitions: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    generation: int
    step: int
    metrics: tuple[tuple[str, float], ...]


PART = Part(step=3, partition=1, generation=2, path="p", size_bytes=9, checksum="crc32c:0", nodes=("a", "b"))


def test_nested_values_come_back_as_they_were() -> None:
    wire = Wire()
    wire.pair(Part, plan_pb2.SnapshotPart)
    point = wire.pair(Point, plan_pb2.RestorePoint)
    value = Point(step=3, parts=(PART, PART))
    message = point.encode(value)
    assert [part.nodes[:] for part in message.parts] == [["a", "b"], ["a", "b"]]
    assert point.decode(plan_pb2.RestorePoint.FromString(message.SerializeToString())) == value


def test_rows_and_what_is_not_known_yet() -> None:
    trainer = Wire().pair(Trainer, plan_pb2.TrainerPlacement, only_message=["numerics_class"])
    value = Trainer(rank=1, node_id="w", attempt=2, shards=((0, 3), (5, 1)), active=True, device=None, microbatch_s=0.5)
    message = trainer.encode(value)
    assert (message.device, message.shards[1].first) == ("", 5)
    assert trainer.decode(message) == value


def test_sets_are_sorted_on_the_wire_and_maps_in_the_value() -> None:
    wire = Wire()
    unreached = wire.pair(Cut, plan_pb2.Unreached, only_message=["reasons"])
    assert unreached.encode(Cut(generation=1, partitions=frozenset({3, 1}))).partitions == [1, 3]
    evaluated = wire.pair(Evaluated, plan_pb2.Evaluated)
    message = plan_pb2.Evaluated(step=4, metrics={"loss": 1.0, "accuracy": 0.5})
    value = evaluated.decode(message)
    assert value.metrics == (("accuracy", 0.5), ("loss", 1.0))
    assert evaluated.encode(value) == message


def test_given_fields_take_the_place_of_the_others() -> None:
    wire = Wire()
    part = wire.pair(Part, plan_pb2.SnapshotPart)
    assert part.encode(PART, step=7).step == 7
    assert part.decode(part.encode(PART), step=8).step == 8


class Role(StrEnum):
    WORKER = "worker"
    SERVER = "server"


def test_enums_correspond_by_name_and_unknown_ones_are_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Registered:
        role: Role

    others = [field.name for field in agents_pb2.RegisterRequest.DESCRIPTOR.fields if field.name != "role"]
    codec = Wire().pair(Registered, agents_pb2.RegisterRequest, only_message=others)
    assert codec.decode(agents_pb2.RegisterRequest(role=agents_pb2.ROLE_SERVER)).role is Role.SERVER
    assert codec.encode(Registered(role=Role.WORKER)).role == agents_pb2.ROLE_WORKER
    for number in (0, 99):
        with pytest.raises(ValueError, match="Role"):
            codec.decode(agents_pb2.RegisterRequest(role=number))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"only_value": ["nodes"]}, "nodes"),  # then the message has it alone
        ({"only_message": ["nodes"]}, "nodes"),  # it is in both
        ({"only_value": ["nodes"], "only_message": ["nodes", "typo"]}, "typo"),
        ({"renamed": {"typo": "step"}}, "typo"),
        ({"renamed": {"path": "typo"}}, "typo"),
    ],
)
def test_a_field_on_one_side_alone_is_an_error(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        Wire().pair(Part, plan_pb2.SnapshotPart, **changes)


def test_a_hint_that_does_not_fit_is_an_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Best:
        step: str
        value: float

    with pytest.raises(TypeError, match="step"):
        Wire().pair(Best, plan_pb2.BestSnapshot)
    with pytest.raises(TypeError, match="parts"):
        Wire().pair(Point, plan_pb2.RestorePoint)  # its parts have no pair


def test_fields_of_nested_messages() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Line:
        source: str
        text: str
        time_s: float
        stream: str

    codec = Wire().pair(
        Line, jobs_pb2.LogRecord, renamed={name: f"line.{name}" for name in ("text", "time_s", "stream")}
    )
    value = Line(source="trainer-0", text="hello", time_s=1.5, stream="stdout")
    assert codec.encode(value) == jobs_pb2.LogRecord(
        source="trainer-0", line={"text": "hello", "time_s": 1.5, "stream": "stdout"}
    )
    assert codec.decode(codec.encode(value)) == value
