"""Batches on the way to a device: each container keeps its type, and what need not move is the very same object."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

import torch

from pscluster.devices import CPU
from pscluster.errors import TaskError

_PLAIN = (str, bytes, bytearray, int, float, complex, type(None))


def to_device(batch: Any, device: str) -> Any:
    """`batch` with every tensor in it on `device`; the batch itself where nothing has to move.

    Through mappings, lists, tuples, sets, data classes, attrs classes and namespaces, of the user's own types too: a
    container in which something moves is copied as copy.copy does, without its constructor, and given the moved parts.
    Other objects move themselves if they have a method `to`, which is not called on the CPU. Raises TaskError for a
    container that can be neither copied nor built from its parts."""
    if isinstance(batch, torch.Tensor):
        return batch if _lies_on(batch, device) else batch.to(device)
    if isinstance(batch, _PLAIN):
        return batch
    if callable(getattr(type(batch), "to", None)):  # of the type: an instance may take any name for a key
        return batch if device == CPU else batch.to(device)
    try:
        return _moved(batch, device)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"a batch of type {type(batch).__name__} cannot be moved to {device}: {type(error).__name__}: {error}",
            action="give the type a method to(device) that returns the moved batch",
        ) from error


def _lies_on(tensor: torch.Tensor, device: str) -> bool:
    wanted = torch.device(device)
    return tensor.device.type == wanted.type and wanted.index in (None, tensor.device.index)


def _moved(batch: Any, device: str) -> Any:
    if isinstance(batch, Mapping):
        return _mapping(batch, device)
    if isinstance(batch, tuple):
        return _tuple(batch, device)
    if isinstance(batch, MutableSequence):
        return _with(batch, enumerate(batch), device, _set_item)
    if isinstance(batch, AbstractSet):
        moved = [to_device(item, device) for item in batch]
        return batch if _same(moved, batch) else type(batch)(moved)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if hasattr(batch, field.name)]
        return _with(batch, [(name, getattr(batch, name)) for name in names], device, object.__setattr__)
    if hasattr(type(batch), "__attrs_attrs__"):
        names = [field.name for field in type(batch).__attrs_attrs__ if hasattr(batch, field.name)]
        return _with(batch, [(name, getattr(batch, name)) for name in names], device, object.__setattr__)
    if isinstance(batch, SimpleNamespace):
        return _with(batch, list(vars(batch).items()), device, setattr)
    return batch


def _with(batch: Any, items: Iterable[tuple[Any, Any]], device: str, put: Callable[[Any, Any, Any], object]) -> Any:
    """A copy of the batch with what of its items has moved; the batch itself where none has."""
    moved = [(key, new) for key, value in items if (new := to_device(value, device)) is not value]
    if not moved:
        return batch
    result = copy.copy(batch)
    for key, value in moved:
        put(result, key, value)
    return result


def _set_item(container: Any, key: Any, value: Any) -> None:
    container[key] = value


def _mapping(batch: Mapping[Any, Any], device: str) -> Any:
    if isinstance(batch, MutableMapping):
        return _with(batch, list(batch.items()), device, _set_item)
    moved = {key: to_device(value, device) for key, value in batch.items()}
    return batch if _same(moved.values(), batch.values()) else type(batch)(moved)  # type: ignore[call-arg]


def _tuple(batch: tuple[Any, ...], device: str) -> Any:
    moved = [to_device(item, device) for item in batch]
    if _same(moved, batch):
        return batch
    result = tuple.__new__(type(batch), moved)
    if hasattr(batch, "__dict__"):
        vars(result).update(vars(batch))
    return result


def _same(moved: Iterable[Any], before: Iterable[Any]) -> bool:
    return all(one is other for one, other in zip(moved, before, strict=True))
