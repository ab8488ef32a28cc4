"""Gives a part of a batch the random numbers that the whole batch drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PERMUTES = torch.ops.aten.randperm  # a part of a permutation is none


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that torch does not hide from its compiler, whose import takes two seconds: nothing is compiled here."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Recording(_Mode):  # type: ignore[no-untyped-call]
    """Within it, what every random operation of torch returns is kept in `drawn`, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn: list[list[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        returned = func(*args, **(kwargs or {}))
        if _is_random(func):
            self.drawn.append([tensor.detach().clone() for tensor in _tensors(returned)])
        return returned


class Replaying(_Mode):  # type: ignore[no-untyped-call]
    """Within it, each random operation returns its part of what the operation of that place in the order drew for a
    whole batch: samples `first` to `stop` of `size`, along the one dimension that is as much shorter as the batch is.

    An operation for which there is no such part keeps its own numbers."""

    def __init__(self, drawn: Sequence[Sequence[Tensor]], first: int, stop: int, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn = drawn
        self._range = (first, stop, size)
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        returned = func(*args, **(kwargs or {}))
        if _is_random(func):
            whole = self._drawn[self._count] if self._count < len(self._drawn) else []
            tensors = _tensors(returned)
            parts = [_part(whole_one, tensor, *self._range) for whole_one, tensor in zip(whole, tensors, strict=False)]
            self._count += 1
            for tensor, part in zip(tensors, parts, strict=False):
                if part is not None and func.overloadpacket is not _PERMUTES:
                    tensor.copy_(part)
        return returned


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _tensors(returned: Any) -> list[Tensor]:
    parts = returned if isinstance(returned, tuple | list) else [returned]
    return [part for part in parts if isinstance(part, Tensor)]


def _part(whole: Tensor, like: Tensor, first: int, stop: int, size: int) -> Tensor | None:
    """The part of `whole` that has the shape of `like`: all of it where the shapes are equal, else a run of the one
    dimension that is shorter in proportion to the samples. None where there is none."""
    if whole.dim() != like.dim() or whole.dtype != like.dtype:
        return None
    shorter = [d for d in range(whole.dim()) if whole.shape[d] != like.shape[d]]
    if not shorter:
        return whole
    dimension = shorter[0]
    if len(shorter) > 1 or whole.shape[dimension] * (stop - first) != like.shape[dimension] * size:
        return None
    return whole.narrow(dimension, whole.shape[dimension] * first // size, like.shape[dimension])
