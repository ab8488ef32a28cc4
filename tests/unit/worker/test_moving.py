"""Batches on the way to a device: their types are kept, and nothing is touched where nothing has to move."""

from __future__ import annotations

from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from pscluster.errors import TaskError
from psworker.trainer.data.moving import to_device


class Pair(NamedTuple):
    x: Any
    y: Any = 3


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping whose keys are attributes; its constructor takes something else than its items."""

    def __init__(self, tensor: Any) -> None:
        super().__init__(x=tensor)

    def __getattr__(self, name: str) -> Any:
        return self.data[name]  # KeyError for what is not there, as careless classes do


@dataclass
class Plain:
    x: Any
    note: str = "kept"
    derived: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.derived = [self.x]


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Any


class Named(dict):  # type: ignore[type-arg]
    """A dict with an attribute, which is not built from its items."""

    def __init__(self, tensor: Any) -> None:
        super().__init__(x=tensor)
        self.note = "kept"


class Row(tuple):  # type: ignore[type-arg]
    """A tuple whose constructor takes another number of arguments."""

    def __new__(cls, x: Any, y: Any) -> Row:
        return super().__new__(cls, (x, y))


class Moves:
    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: str) -> Moves:
        return Moves(self.x.to(device))


class Fixed(Mapping):  # type: ignore[type-arg]
    """A mapping that cannot be built from another."""

    def __init__(self, x: Any, y: Any) -> None:
        self._held = {"x": x, "y": y}

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


BUILT = {
    "tensor": lambda x: x,
    "dict": lambda x: {"x": x, "text": "a"},
    "ordered": lambda x: OrderedDict(b=1, x=x),
    "default": lambda x: defaultdict(list, x=x),
    "subclass of dict": Named,
    "user dict with attributes": Encoding,
    "proxy": lambda x: MappingProxyType({"x": x}),
    "list": lambda x: [1, x],
    "user list": lambda x: UserList([x]),
    "deque": lambda x: deque([x, 2], maxlen=2),
    "tuple": lambda x: (x, None),
    "named tuple": Pair,
    "old named tuple": lambda x: namedtuple("old", "x")(x),
    "subclass of tuple": lambda x: Row(x, 2),
    "set": lambda x: {x},
    "data class": Plain,
    "frozen data class": Frozen,
    "namespace": lambda x: SimpleNamespace(x=x, n=1),
    "moves itself": Moves,
    "packed": lambda x: nn.utils.rnn.pack_sequence([x]),
    "nested": lambda x: {"a": [Frozen((Pair(x), "text"))], "b": Encoding([x])},
}


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """Every tensor of a batch, by looking into whatever it is made of."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, nn.utils.rnn.PackedSequence):
        return [batch.data]  # its lengths stay in host memory
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in tensors_in(value)]
    if isinstance(batch, list | tuple | set | deque | UserList):
        return [t for value in batch for t in tensors_in(value)]
    names = getattr(batch, "__dataclass_fields__", None) or getattr(batch, "__dict__", {})
    return [t for name in names for t in tensors_in(getattr(batch, name))]


@pytest.mark.parametrize("case", BUILT)
def test_a_batch_keeps_its_type_and_everything_else(case: str) -> None:
    batch = BUILT[case](torch.zeros(2))
    moved = to_device(batch, "meta")

    assert type(moved) is type(batch)
    assert tensors_in(moved) and all(tensor.is_meta for tensor in tensors_in(moved))
    assert not any(t.is_meta for t in tensors_in(batch)), "the batch itself is left as it is"


@pytest.mark.parametrize("case", BUILT)
def test_where_nothing_moves_the_batch_is_the_same_object(case: str) -> None:
    batch = BUILT[case](torch.zeros(2))

    assert to_device(batch, "cpu") is batch


def test_what_a_container_holds_beside_tensors_is_kept() -> None:
    x = torch.zeros(1)
    assert to_device(Named(x), "meta").note == "kept"
    assert to_device(Encoding(x), "meta").x.is_meta
    assert to_device(defaultdict(list, x=x), "meta")["new"] == []
    assert to_device(deque([x, 2, 3], maxlen=3), "meta").maxlen == 3
    assert to_device(Pair(x), "meta").y == 3
    plain = to_device(Plain(x), "meta")
    assert (plain.note, plain.derived[0].is_meta) == ("kept", True)


def test_an_unknown_object_passes_and_a_container_that_cannot_be_built_is_named() -> None:
    odd = object()
    assert to_device([odd], "meta")[0] is odd
    with pytest.raises(TaskError, match="Fixed cannot be moved") as caught:
        to_device({"a": Fixed(torch.zeros(1), 2)}, "meta")
    assert "to(device)" in caught.value.action
    fixed = Fixed(torch.zeros(1), 2)
    assert to_device(fixed, "cpu") is fixed
