"""Frozen dataclasses to protobuf messages and back, driven by field names and type hints.

    wire = Wire()
    part = wire.pair(Part, plan_pb2.SnapshotPart)
    part.decode(message)  # a Part
    part.encode(value)    # a plan_pb2.SnapshotPart

Fields correspond by name; a pair's table names the exceptions. A field that only one side has, and that the table does
not name, is a TypeError when the pair is made, and so is a hint that does not fit its field. Values:

| hint | field |
| --- | --- |
| bool, int, float, str, bytes | a scalar of that kind |
| `X | None` | a scalar whose zero is None; a message that may be unset |
| a dataclass that was paired or adapted before | a message |
| an enum; str | an enum, by its name without the prefix ("JOB_STATE_") |
| tuple[X, ...], frozenset[X] | repeated |
| tuple[tuple[X, Y], ...] | repeated messages of two fields in this order; a map, sorted by key |
| dict[str, X] | a map |
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

T = TypeVar("T")
M = TypeVar("M", bound=Message)

Convert = Callable[[Any], Any]
_F = FieldDescriptor
_SCALARS: Mapping[type, frozenset[int]] = {
    bool: frozenset({_F.TYPE_BOOL}),
    int: frozenset({_F.TYPE_INT32, _F.TYPE_INT64, _F.TYPE_UINT32, _F.TYPE_UINT64}),
    float: frozenset({_F.TYPE_DOUBLE, _F.TYPE_FLOAT}),
    str: frozenset({_F.TYPE_STRING}),
    bytes: frozenset({_F.TYPE_BYTES}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Field:
    """One dataclass field and the message field at `path`; more than one name: inside nested messages."""

    name: str
    path: tuple[str, ...]
    read: Convert
    write: Convert
    is_set: bool  # an unset message is read as None

    def decode(self, message: Any) -> Any:
        for name in self.path[:-1]:
            message = getattr(message, name)
        if self.is_set and not message.HasField(self.path[-1]):
            return None
        return self.read(getattr(message, self.path[-1]))


class Codec(Generic[T, M]):
    """One dataclass and its message. Made by `Wire.pair`."""

    def __init__(self, kind: type[T], message: type[M], fields: Iterable[_Field]) -> None:
        self._kind = kind
        self._message = message
        self._fields = tuple(fields)

    def decode(self, message: M, **given: Any) -> T:
        """The value. `given`: fields that are not in the message, or that take the place of those in it."""
        values = {field.name: field.decode(message) for field in self._fields if field.name not in given}
        return self._kind(**values, **given)

    def encode(self, value: T, **given: Any) -> M:
        """The message. `given`: its fields that are not in the value, or that take the place of those in it."""
        values: dict[str, Any] = {}
        for field in self._fields:
            if field.path[0] in given:
                continue
            target = values
            for name in field.path[:-1]:
                target = target.setdefault(name, {})
            target[field.path[-1]] = field.write(getattr(value, field.name))
        return self._message(**values, **given)


class Wire:
    """The pairs of one model; nested dataclasses are converted by their own pair, which must be made first."""

    def __init__(self) -> None:
        self._nested: dict[tuple[Any, str], tuple[Convert, Convert]] = {}

    def pair(
        self,
        kind: type[T],
        message: type[M],
        *,
        renamed: Mapping[str, str] = types.MappingProxyType({}),
        only_value: Iterable[str] = (),
        only_message: Iterable[str] = (),
    ) -> Codec[T, M]:
        """`renamed`: dataclass field to message field; "a.b" is field b of message a. `only_value`, `only_message`:
        fields that the other side lacks, given to `decode` or `encode` where needed. Raises TypeError unless each field
        is accounted for."""
        hints, descriptor = typing.get_type_hints(kind), typing.cast(Any, message.DESCRIPTOR)
        apart, extra = frozenset(only_value), frozenset(only_message)
        names = [field.name for field in dataclasses.fields(typing.cast(Any, kind)) if field.name not in apart]
        paths = {name: tuple(renamed.get(name, name).split(".")) for name in names}
        here, there = set(hints), {field.name for field in descriptor.fields}
        mapped = {path[0] for path in paths.values()}
        if wrong := (apart | set(renamed)) - here | (mapped | extra) - there | mapped & extra:
            raise TypeError(f"{kind.__name__} and {descriptor.name}: no such fields, or in both: {sorted(wrong)}")
        if lost := there - mapped - extra:
            raise TypeError(f"{kind.__name__} does not have these fields of {descriptor.name}: {sorted(lost)}")
        fields = [self._field(name, hints[name], paths[name], descriptor) for name in names]
        codec = Codec(kind, message, fields)
        self._nested[kind, descriptor.full_name] = (codec.decode, codec.encode)
        return codec

    def adapt(self, kind: type[T], message: type[M], decode: Callable[[M], T], encode: Callable[[T], M]) -> None:
        """Convert nested values of `kind`, which may be no dataclass, by these functions."""
        self._nested[kind, message.DESCRIPTOR.full_name] = (decode, encode)

    def _field(self, name: str, hint: Any, path: tuple[str, ...], descriptor: Any) -> _Field:
        field: Any = descriptor.fields_by_name[path[0]]
        for inner in path[1:]:
            field = field.message_type.fields_by_name[inner]
        optional, hint = _optional(hint)
        try:
            read, write = self._repeated(hint, field) if _is_repeated(field) else self._single(hint, field)
        except (TypeError, KeyError):
            raise TypeError(f"{field.full_name} does not fit the hint of {name}, {hint}") from None
        is_message = field.message_type is not None and not _is_repeated(field)
        if optional and not is_message:
            read, write = (lambda value, read=read: read(value) or None), _unless_none(write)  # type: ignore[misc]
        elif optional:
            write = _unless_none(write)
        return _Field(name=name, path=path, read=read, write=write, is_set=optional and is_message)

    def _single(self, hint: Any, field: FieldDescriptor) -> tuple[Convert, Convert]:
        if field.message_type is not None:
            return self._nested[hint, field.message_type.full_name]
        if field.enum_type is not None:
            return _enum(hint, field.enum_type)
        if field.type not in _SCALARS[hint]:
            raise TypeError
        return _same, _same

    def _repeated(self, hint: Any, field: FieldDescriptor) -> tuple[Convert, Convert]:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if _is_map(field):
            return self._map(origin, arguments, field)
        if origin not in (tuple, frozenset) or (origin is tuple and arguments[-1] is not Ellipsis):
            raise TypeError
        if field.message_type is not None and typing.get_origin(arguments[0]) is tuple:
            return _rows(arguments[0], field.message_type)
        read, write = self._single(arguments[0], field)
        if origin is frozenset:
            return (lambda values: frozenset(map(read, values))), (lambda values: sorted(map(write, values)))
        if read is _same:
            return tuple, _same
        return (lambda values: tuple(map(read, values))), (lambda values: list(map(write, values)))

    def _map(self, origin: Any, arguments: tuple[Any, ...], field: Any) -> tuple[Convert, Convert]:
        value_field = field.message_type.fields_by_name["value"]
        value_hint = arguments[1] if origin is dict else typing.get_args(arguments[0])[1]
        if self._single(value_hint, value_field)[0] is not _same:
            raise TypeError
        if origin is dict:
            return dict, _same
        return (lambda values: tuple(sorted(values.items()))), dict


def _rows(hint: Any, message: Descriptor) -> tuple[Convert, Convert]:
    """Tuples as messages of scalar fields, in the order of the fields' numbers."""
    names = [field.name for field in sorted(message.fields, key=lambda field: field.number)]
    kinds = typing.get_args(hint)
    if len(kinds) != len(names) or any(
        message.fields_by_name[name].type not in _SCALARS[kind] for name, kind in zip(names, kinds, strict=True)
    ):
        raise TypeError
    return (
        lambda rows: tuple(tuple(getattr(row, name) for name in names) for row in rows),
        lambda rows: [dict(zip(names, row, strict=True)) for row in rows],
    )


def _enum(hint: Any, descriptor: EnumDescriptor) -> tuple[Convert, Convert]:
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", descriptor.name).upper() + "_"
    words = {value.number: value.name.removeprefix(prefix) for value in descriptor.values}
    if hint is str:
        known: dict[int, Any] = dict(words)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        known = {number: hint[word] for number, word in words.items() if word in hint.__members__}
        if len(known) != len(hint):
            raise TypeError
    else:
        raise TypeError
    numbers = {value: number for number, value in known.items()}

    def read(number: int) -> Any:
        if number not in known:
            raise ValueError(f"{number} is no {descriptor.name} that this version knows")
        return known[number]

    return read, numbers.__getitem__


def _same(value: Any) -> Any:
    return value


def _unless_none(write: Convert) -> Convert:
    return lambda value: None if value is None else write(value)


def _optional(hint: Any) -> tuple[bool, Any]:
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return False, hint
    (inner,) = (part for part in typing.get_args(hint) if part is not type(None))
    return True, inner


def _is_repeated(field: FieldDescriptor) -> bool:
    return bool(field.label == _F.LABEL_REPEATED if hasattr(field, "label") else field.is_repeated)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
