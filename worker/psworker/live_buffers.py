"""The module's own buffers. Every microbatch begins with all of them at their committed values, since every shard of a
step starts from the same ones; what it did to them is taken from the module afterwards.

Buffers outside the state dict may be replaced, resized, added or removed by forward: what it makes of them is the
microbatch's own, and the next one begins without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pscluster.errors import ModelChangedError
from pscluster.step.layout import Layout
from psworker.model_tensors import FoundTensor, is_lazy
from psworker.tensor_words import dense_parts, dtype_of, form_of, part_views, parts_of, same_bits, tensor_view

_SCRATCH = (
    "register it with persistent=False, if forward may make it anew in every microbatch, or keep it as it is built"
)


class LiveBuffers:
    """`flats`: where the committed values lie, for good."""

    def __init__(
        self, model: nn.Module, layout: Layout, found: Sequence[FoundTensor], flats: Sequence[torch.Tensor]
    ) -> None:
        self._layout = layout
        self._flats = flats
        self._found = {number: one for number, one in enumerate(found) if not one.is_parameter}
        self._facts = {number: _facts_of(one.tensors[0]) for number, one in self._found.items()}
        self._committed = {number: part_views(layout, flats, number) for number in self._found}
        self._registered = [_Registered.of(name, module) for name, module in model.named_modules()]
        self._is_intact = False  # the constants have their committed values
        for number, one in self._found.items():
            if _is_expanded(one.tensors[0]):
                self._put_back(number)

    def restore(self) -> None:
        """Set every buffer of the module to its committed value, and drop those that were added.

        Raises ModelChangedError for one of the state dict that was resized or removed."""
        for module in self._registered:
            module.drop_added()
        with torch.no_grad():
            for number, one in self._found.items():
                live = self._live(number)
                if live is None or _is_expanded(live):
                    live = self._put_back(number)
                elif one.spec.kind == "frozen" and self._is_intact:
                    continue
                for mine, part in zip(dense_parts(live), self._committed[number], strict=True):
                    mine.copy_(part)
        self._is_intact = False

    def check(self) -> list[int]:
        """After a microbatch: the averaged buffers whose live value differs from the committed one.

        Raises ModelChangedError for a constant that moved, and for one of the state dict that was resized, removed,
        added, or is no longer the same in all its places."""
        for module in self._registered:
            module.check()
        touched = []
        for number, one in self._found.items():
            live = self._live(number)
            if live is None:
                continue
            if one.spec.kind == "averaged":
                mine, committed = live.detach(), self._committed[number][0]
                # By value, and NaN is the same as itself.
                if not (torch.equal(mine, committed) or same_bits(mine, committed)):
                    touched.append(number)
            elif one.spec.kind == "frozen":
                self._check_constant(number, live)
        self._is_intact = True
        return touched

    def _check_constant(self, number: int, live: torch.Tensor) -> None:
        parts = zip(dense_parts(live), self._committed[number], strict=True)
        if all(same_bits(mine, part) for mine, part in parts):
            return
        spec = self._found[number].spec
        raise ModelChangedError(
            f"the buffer {spec.name} changed its value: it is {spec.form or 'dense'} {spec.dtype}, and only dense "
            "float32 ones are averaged over the shards",
            action="make it a dense float32 buffer, or register it with persistent=False and replace it in forward",
            details={"buffer": spec.name},
        )

    def weighted(self, bucket: int, weight: float) -> torch.Tensor:
        """A new fp32 tensor of an averaged bucket's words: each live buffer times `weight`, zeros between."""
        return self._words(bucket, lambda live, words: torch.mul(live, weight, out=words))

    def carried(self, bucket: int) -> torch.Tensor:
        """A new int32 tensor of a carried bucket's words, from the live buffers."""
        return self._words(bucket, lambda live, words: words.copy_(live))

    def _words(self, bucket: int, write: Callable[[torch.Tensor, torch.Tensor], object]) -> torch.Tensor:
        words = torch.zeros_like(self._flats[bucket])
        flats = [*self._flats[:bucket], words, *self._flats[bucket + 1 :]]
        for placed in self._layout.buckets[bucket].placed:
            live = self._live(placed.tensor)
            value = self._committed[placed.tensor][0] if live is None else live.detach()
            write(value, part_views(self._layout, flats, placed.tensor)[0])
        return words

    def _live(self, number: int) -> torch.Tensor | None:
        """The module's tensor; None: it has another shape, which only one outside the state dict may have."""
        one = self._found[number]
        held = [_buffer(owner, leaf) for owner, leaf in one.places]
        live = held[0]
        fits = live is not None and _facts_of(live) == self._facts[number]
        if fits and all(other is live for other in held):
            return live
        if one.spec.persistent:
            before = f"{list(one.spec.shape)} of {one.spec.dtype}"
            now = "is gone" if live is None else f"changed from {before} to {list(live.shape)} of {dtype_of(live)}"
            if fits:
                now = f"is no longer one tensor with {', '.join(one.spec.names[1:])}"
            raise ModelChangedError(
                f"the buffer {one.spec.name} {now}", action=_SCRATCH, details={"buffer": one.spec.name}
            )
        return None

    def _put_back(self, number: int) -> torch.Tensor:
        """Give the module a new tensor of the committed value."""
        fresh = tensor_view(self._layout, self._flats, number).clone()
        for owner, leaf in self._found[number].places:
            owner._buffers[leaf] = fresh
        return fresh


@dataclass(frozen=True)
class _Registered:
    """The names of a module's buffers when the layout was taken; `empty`: those that were None."""

    prefix: str
    module: nn.Module
    names: frozenset[str]
    empty: tuple[str, ...]

    @classmethod
    def of(cls, prefix: str, module: nn.Module) -> _Registered:
        empty = tuple(leaf for leaf, tensor in module._buffers.items() if tensor is None)
        return cls(prefix, module, frozenset(module._buffers.keys()), empty)

    @property
    def added(self) -> list[str]:
        """The names of buffers that were not there, or were None."""
        held = self.module._buffers
        if not self.empty and self.names.issuperset(held.keys()):
            return []
        return [leaf for leaf, tensor in held.items() if tensor is not None and self._is_new(leaf)]

    def _is_new(self, leaf: str) -> bool:
        return leaf in self.empty or leaf not in self.names

    def check(self) -> None:
        """Raises ModelChangedError for one that was added to the state dict."""
        for leaf in self.added:
            if leaf not in getattr(self.module, "_non_persistent_buffers_set", ()):
                name = f"{self.prefix}.{leaf}" if self.prefix else leaf
                raise ModelChangedError(
                    f"the buffer {name} was added to the model", action=_SCRATCH, details={"buffer": name}
                )

    def drop_added(self) -> None:
        """Have the module hold those again that it held."""
        for leaf in self.added:
            if leaf in self.names:
                self.module._buffers[leaf] = None
            else:
                delattr(self.module, leaf)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer back on leaving: the tensor that was in each place, with the value it had."""
    before = [
        (module, leaf, tensor, None if tensor is None or is_lazy(tensor) else [p.clone() for p in dense_parts(tensor)])
        for module in model.modules()
        for leaf, tensor in module._buffers.items()
    ]
    known = {(id(module), leaf) for module, leaf, _, _ in before}
    try:
        yield
    finally:
        with torch.no_grad():
            for module in model.modules():
                for leaf in [leaf for leaf, _ in module._buffers.items() if (id(module), leaf) not in known]:
                    delattr(module, leaf)
            for module, leaf, tensor, values in before:
                if tensor is not None and values is None:
                    continue  # it was lazy, and has its first value now
                module._buffers[leaf] = tensor
                for part, value in zip(dense_parts(tensor) if tensor is not None else (), values or (), strict=True):
                    if not same_bits(part, value):
                        part.copy_(value)


def _buffer(owner: nn.Module, leaf: str) -> torch.Tensor | None:
    held = owner._buffers
    return held[leaf] if leaf in held else None  # noqa: SIM401 - TorchScript's has no `get`


def _facts_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a buffer of the state dict keeps; of a sparse one also how many elements it has."""
    facts = (tensor.layout, tensor.dtype, tensor.shape)
    return facts if tensor.layout == torch.strided else (*facts, parts_of(tensor), form_of(tensor))


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several elements are one in memory, so that it cannot be written to."""
    return tensor.layout == torch.strided and tensor.numel() > 1 and 0 in tensor.stride()
