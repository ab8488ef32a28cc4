"""What any structure of tensors, arrays and objects holds, as leaves that can be compared after it has changed."""

from __future__ import annotations

import dataclasses
from collections import UserList, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any
from uuid import UUID

import crc32c
import numpy as np
import torch

_PLAIN = (str, int, float, complex, np.generic, Enum, PurePath, date, time, timedelta, Decimal, Fraction, UUID)
_DEEPEST = 24
_LONGEST_SHOWN = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One value in a structure. `path`: as Python writes it, "[0]['x'].mask"; `kind`: type and shape; `shown`: the
    value for people, empty for a large one.

    A value that cannot be read has the checksum 0: two of one kind are then alike."""

    path: str
    kind: str
    checksum: int = 0
    shown: str = ""

    def __str__(self) -> str:
        return self.shown or self.kind


Leaves = Sequence[Leaf]


def leaves_of(value: object, path: str = "") -> Leaves:
    """The leaves of a structure, in its own order; the order of a mapping's keys is one of them.

    Of an object of any other type these are its public attributes, or its bytes where it offers them."""
    return tuple(_walk(value, path, ()))


def first_difference(one: Leaves, other: Leaves) -> tuple[Leaf, Leaf] | None:
    """The first pair of leaves that differ; where a structure has more of them, the other's counterpart is absent."""
    for left, right in zip(one, other, strict=False):
        if left != right:
            return left, right
    longer, shorter = (one, other) if len(one) > len(other) else (other, one)
    if len(longer) == len(shorter):
        return None
    extra = longer[len(shorter)]
    absent = Leaf(path=extra.path, kind="absent")
    return (extra, absent) if longer is one else (absent, extra)


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32C of a dense tensor's values. A CUDA tensor goes through host memory."""
    content = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return crc32c.crc32c(content.numpy().data)


def _walk(value: object, path: str, above: tuple[int, ...]) -> Iterator[Leaf]:
    name = type(value).__name__
    if isinstance(value, torch.Tensor):
        yield from _tensor(value, path, above)
    elif isinstance(value, np.ndarray):
        yield from _array(value, path, above)
    elif value is None or isinstance(value, _PLAIN):
        yield Leaf(path=path, kind=name, checksum=_of_text(repr(value)), shown=_shown(value))
    elif isinstance(value, bytes | bytearray | memoryview):
        yield Leaf(path=path, kind=f"{name} of {len(value)}", checksum=crc32c.crc32c(bytes(value)))
    elif id(value) in above or len(above) > _DEEPEST:
        yield Leaf(path=path, kind=f"{name} again")
    else:
        yield from _container(value, path, (*above, id(value)))


def _container(value: object, path: str, above: tuple[int, ...]) -> Iterator[Leaf]:
    name = type(value).__name__
    if isinstance(value, Mapping):
        keys = [_key(key) for key in value]
        yield Leaf(path=path, kind=name, checksum=_of_text(str(keys)), shown=f"keys {_cut(', '.join(keys))}")
        yield from _each(((f"{path}[{key}]", value[own]) for key, own in zip(keys, value, strict=True)), above)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from _each(((f"{path}.{key}", getattr(value, key)) for key in value._fields), above)
    elif isinstance(value, list | tuple | deque | range | UserList):
        yield from _sequence(value, path, above)
    elif isinstance(value, Set):
        keys = sorted(_key(item) for item in value)
        yield Leaf(path=path, kind=name, checksum=_of_text(str(keys)), shown=_cut(f"{{{', '.join(keys)}}}"))
    elif dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        yield from _each(((f"{path}.{key}", getattr(value, key, None)) for key in fields), above)
    else:
        try:
            found = list(_object(value, path, above))
        except Exception:  # its own code raised: there is nothing to compare
            found = [Leaf(path=path, kind=name)]
        yield from found


def _each(parts: Iterable[tuple[str, object]], above: tuple[int, ...]) -> Iterator[Leaf]:
    for path, part in parts:
        yield from _walk(part, path, above)


def _sequence(value: Sequence[Any], path: str, above: tuple[int, ...]) -> Iterator[Leaf]:
    """One leaf for a list of numbers or words, which may be long: the tokens of a text."""
    name = type(value).__name__
    if all(isinstance(item, str | int | float) for item in value):
        yield Leaf(path=path, kind=f"{name} of {len(value)}", checksum=_of_text(repr(value)), shown=_shown(value))
        return
    yield Leaf(path=path, kind=f"{name} of {len(value)}")
    yield from _each(((f"{path}[{index}]", item) for index, item in enumerate(value)), above)


def _tensor(tensor: torch.Tensor, path: str, above: tuple[int, ...]) -> Iterator[Leaf]:
    kind = f"{str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)}"
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        yield Leaf(path=path, kind=kind)
    elif tensor.layout == torch.sparse_coo:
        coalesced = tensor.detach().coalesce()
        yield Leaf(path=path, kind=f"sparse {kind}", checksum=checksum(coalesced.indices()))
        yield from _tensor(coalesced.values(), path, above)
    elif tensor.layout != torch.strided:
        yield from _tensor(tensor.detach().to_dense(), path, above)
    else:
        shown = _shown(tensor.item()) if tensor.numel() == 1 else ""
        yield Leaf(path=path, kind=kind, checksum=checksum(tensor), shown=shown)


def _array(array: np.ndarray[Any, Any], path: str, above: tuple[int, ...]) -> Iterator[Leaf]:
    kind = f"{array.dtype} array of shape {array.shape}"
    if array.dtype.hasobject:
        yield Leaf(path=path, kind=kind)
        yield from _walk(array.tolist(), path, above)
    else:
        shown = _shown(array.item()) if array.size == 1 else ""
        yield Leaf(path=path, kind=kind, checksum=crc32c.crc32c(array.tobytes()), shown=shown)


def _object(value: object, path: str, above: tuple[int, ...]) -> Iterator[Leaf]:
    """Public attributes only: a private one may be a cache, which a first use fills. Modules are no content."""
    name = type(value).__name__
    if isinstance(value, torch.nn.Module | type) or callable(value):
        yield Leaf(path=path, kind=name)
    elif callable(to_bytes := getattr(value, "tobytes", None)):  # images, arrays of the standard library
        yield Leaf(path=path, kind=name, checksum=crc32c.crc32c(to_bytes()))
    elif hasattr(value, "__array__"):
        yield from _array(np.asarray(value), path, above)
    else:
        yield Leaf(path=path, kind=name)
        slots = [key for kind in type(value).__mro__ for key in _slots(kind)]
        names = [key for key in (*slots, *getattr(value, "__dict__", {})) if not key.startswith("_")]
        yield from _each(((f"{path}.{key}", getattr(value, key, None)) for key in names), above)


def _key(value: object) -> str:
    """What can be a key, as text: of an object without a value of its own only the type, not its address."""
    parts = value if isinstance(value, tuple) else (value,)
    is_plain = all(part is None or isinstance(part, (bytes, *_PLAIN)) for part in parts)
    return repr(value) if is_plain else type(value).__name__


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _of_text(text: str) -> int:
    return crc32c.crc32c(text.encode("utf-8", "surrogatepass"))


def _shown(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
