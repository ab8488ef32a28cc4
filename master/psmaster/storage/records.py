"""Jobs, events and parts as JSON text, for the store. Unknown fields are ignored, missing ones get their default; the
schema version decides whether a database may be read at all."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pscluster.errors import StorageError
from pscluster.job.spec import JobSpec, parse_spec
from psmaster.model.job import VOLATILE, Event, Job, JobWarning
from psmaster.model.plan import Plan

T = TypeVar("T")

# Field names of records that version 0.1 wrote (schema 4), and what they are called since; by the record that has them.
_RENAMED: Mapping[type, Mapping[str, str]] = {
    Job: {"trouble": "snapshot_warning"},
    JobWarning: {"problem": "error"},
    Plan: {"lead_generation": "coordinator_generation"},
}

# Stored beside the record: the layout is large and never changes, so it is not rewritten with every step.
_APART = frozenset({"layout_json"})


def job_text(job: Job) -> str:
    """The job without its layout and its volatile fields."""
    return json.dumps(plain(job, VOLATILE | _APART), separators=(",", ":"))


def job_of(text: str, layout_json: bytes) -> Job:
    """The job that `job_text` described. Raises StorageError for text that describes none."""
    return dataclasses.replace(_parse(Job, text), layout_json=layout_json)


def plain(value: Any, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A dataclass as plain JSON types, without some of its fields; `typed` reads it."""
    return {
        field.name: _plain(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if field.name not in without
    }


def typed(kind: type[T], data: Any) -> T:
    """The value that `plain` described. Raises ValueError, TypeError, KeyError for data that describe none."""
    return typing.cast(T, _typed(kind, data))


def event_text(event: Event) -> str:
    return json.dumps(_plain(event), separators=(",", ":"))


def event_of(text: str) -> Event:
    """The event that `event_text` described. Raises StorageError for text that describes none."""
    return _parse(Event, text)


def _parse(kind: type[T], text: str) -> T:
    try:
        return typed(kind, json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"the store holds a {kind.__name__} that cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, JobSpec):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return plain(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return value.value if isinstance(value, enum.Enum) else value


def _typed(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (part for part in typing.get_args(hint) if part is not type(None))
        return None if value is None else _typed(inner, value)
    if origin is tuple:
        parts = typing.get_args(hint)
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_typed(kind, item) for kind, item in zip(kinds, value, strict=True))
    if hint is JobSpec:
        return parse_spec(value)
    if dataclasses.is_dataclass(hint):
        hints = _hints(typing.cast(type, hint))
        renamed = _RENAMED.get(typing.cast(type, hint), {})
        current = {renamed.get(name, name): item for name, item in value.items()}
        return typing.cast(Any, hint)(
            **{name: _typed(hints[name], item) for name, item in current.items() if name in hints}
        )
    if hint is bytes:
        return bytes.fromhex(value)
    if hint is float and math.isnan(value):
        return math.nan  # the very object that defaults use: records with it compare equal
    if isinstance(hint, type) and issubclass(hint, enum.Enum | int | float | str):
        return hint(value)
    raise TypeError(f"no reading of {hint}")


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)
