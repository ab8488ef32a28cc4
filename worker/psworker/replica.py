"""A trainer's replica of the model: the module's tensors bound to flat bucket memory that values land in.

Parameters are views of their bucket, so that receiving a bucket sets them. Buffers stay the module's own; the
committed ones lie in their bucket and are copied in before each microbatch, since every shard starts from them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pscluster.errors import LayoutError
from pscluster.job.spec import OptimizerSection
from pscluster.step.layout import (
    ITEM_BYTES,
    WORD_BYTES,
    BucketKind,
    Layout,
    NamedBytes,
    Span,
    TensorSpec,
    parameters_sha256,
)
from pscluster.wire.memory import Arena, Segment, page_offsets
from psworker.staging import HostStaging, Staging


class BucketMemory:
    """`flats[b]` is bucket b: fp32 for trained and averaged buckets, int32 words for the raw ones.

    A span of it may become a window onto a partition's segment. Then it holds whatever the partition holds, now and
    later, and must not be written; the tensors over it stay valid either way. Partitions begin on block boundaries,
    which are page boundaries."""

    def __init__(self, layout: Layout, *, windows: bool = True) -> None:
        """`windows=False`: there are none, so that the pages stay the same ones for good."""
        self.may_window = windows
        self._layout = layout
        self._offsets, size = page_offsets(b.num_words * WORD_BYTES for b in layout.buckets)
        self._arena = Arena(size)
        self._windows: dict[tuple[int, int], Segment] = {}  # bucket, first word of the span
        self.flats = [
            torch.frombuffer(self._arena.view, dtype=_dtype(b.kind), offset=at, count=b.num_words)
            for b, at in zip(layout.buckets, self._offsets, strict=True)
        ]

    def words(self, span: Span) -> torch.Tensor:
        """The words of a span, as they are."""
        return self.flats[span.bucket][span.start : span.stop]

    def writable(self, span: Span) -> torch.Tensor:
        """The words of a span, in memory of this process; a window there is closed first, its content gone."""
        if self._windows.pop((span.bucket, span.start), None) is not None:
            self._arena.make_private(self._offset(span), span.size_bytes)
        return self.words(span)

    def show(self, span: Span, segment: Segment, segment_offset: int) -> None:
        """Make a span a window onto the segment, from `segment_offset` on. Only where windows may be."""
        assert self.may_window
        if self._windows.get((span.bucket, span.start)) is not segment:
            self._arena.show(self._offset(span), segment, segment_offset, span.size_bytes)
            self._windows[(span.bucket, span.start)] = segment

    def close_windows(self) -> None:
        """Make all memory private again, if there are windows; it is zeroed then."""
        if not self._windows:
            return
        self._windows.clear()
        for bucket, offset in zip(self._layout.buckets, self._offsets, strict=True):
            self._arena.make_private(offset, bucket.num_words * WORD_BYTES)

    def _offset(self, span: Span) -> int:
        return self._offsets[span.bucket] + span.start * WORD_BYTES


@dataclass(frozen=True)
class _Found:
    """One tensor of a module under its first name; `owner._buffers[leaf]` is the live one of a buffer."""

    spec: TensorSpec
    owner: nn.Module
    leaf: str
    is_parameter: bool


def layout_of(model: nn.Module, optimizer: OptimizerSection) -> Layout:
    """The layout of a model, in the order in which its modules register their tensors.

    Raises LayoutError naming the tensor for what cannot be trained exactly: a trainable parameter or averaged buffer
    that is not float32, an uninitialised or complex tensor, a model without trainable parameters."""
    found = _find(model, optimizer)
    if not any(f.spec.kind == "trained" for f in found):
        raise LayoutError("the model has no trainable parameter", action="return a model with requires_grad parameters")
    return Layout(tuple(f.spec for f in found))


class Replica:
    """`flats[b]` is bucket b where the model is: fp32 for trained and averaged buckets, int32 words for the raw ones.

    In host memory it is the bucket's part of `memory`, else a copy of it, which `load_bucket` makes.
    Whoever fills the flats of trained and frozen buckets sets the module's parameters. Autograd does
    not notice what is written there while a forward or backward runs: its result must then be dropped."""

    def __init__(self, model: nn.Module, optimizer: OptimizerSection, staging: Staging | None = None) -> None:
        self.model = model
        self._staging = staging or HostStaging()
        self._found = _find(model, optimizer)
        self.layout = layout_of(model, optimizer)
        self.memory = BucketMemory(self.layout, windows=self._staging.is_host)
        self.flats = self.memory.flats
        self.device = str(next(model.parameters()).device)
        if not self._staging.is_host:
            self.flats = [flat.to(self.device) for flat in self.memory.flats]
            for flat in self.memory.flats:
                self._staging.pin(flat)
        self.parameters: dict[int, nn.Parameter] = {}
        for number, found in enumerate(self._found):
            view = tensor_view(self.layout, self.flats, number)
            with torch.no_grad():
                view.copy_(_live(found))
                if not self._staging.is_host:
                    tensor_view(self.layout, self.memory.flats, number).copy_(view)
            if found.is_parameter:
                parameter = found.owner._parameters[found.leaf]
                assert parameter is not None
                parameter.data = view
                if found.spec.kind == "trained":
                    self.parameters[number] = parameter

    def load_bucket(self, bucket: int) -> None:
        """Make what landed in a bucket of `memory` visible to the model."""
        self._staging.copy_in(self.memory.flats[bucket], self.flats[bucket])

    def restore_buffers(self) -> None:
        """Set every buffer of the module to its committed value."""
        with torch.no_grad():
            for number, found in self._buffers():
                _live(found).copy_(tensor_view(self.layout, self.flats, number))

    def touched_buffers(self) -> list[int]:
        """The averaged buffers whose live value differs from the committed one, bit for bit."""
        return [
            number
            for number, found in self._buffers()
            if found.spec.kind == "averaged"
            and not torch.equal(_live(found).detach(), tensor_view(self.layout, self.flats, number))
        ]

    def weighted_buffers(self, bucket: int, weight: float) -> torch.Tensor:
        """A new fp32 tensor of an averaged bucket's words: each live buffer times `weight`, zeros between."""
        words = torch.zeros_like(self.flats[bucket])
        flats = [*self.flats[:bucket], words, *self.flats[bucket + 1 :]]
        for number, found in self._buffers():
            if self.layout.bucket_of[number][0] == bucket:
                torch.mul(_live(found).detach(), weight, out=tensor_view(self.layout, flats, number))
        return words

    def carried_words(self, bucket: int) -> torch.Tensor:
        """A new int32 tensor of a carried bucket's words, from the live buffers."""
        words = torch.zeros_like(self.flats[bucket])
        flats = [*self.flats[:bucket], words, *self.flats[bucket + 1 :]]
        for number, found in self._buffers():
            if self.layout.bucket_of[number][0] == bucket:
                tensor_view(self.layout, flats, number).copy_(_live(found).detach())
        return words

    def sha256(self) -> str:
        """Digest of the committed values of everything in the state dict."""
        return parameters_sha256(named_bytes(state_tensors(self.layout, self.flats)))

    def _buffers(self) -> Iterator[tuple[int, _Found]]:
        return ((n, f) for n, f in enumerate(self._found) if not f.is_parameter and f.spec.num_elements)


def tensor_view(layout: Layout, flats: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    """Tensor `number` of the layout as a view, in its own dtype and shape, of its bucket's memory."""
    spec = layout.tensors[number]
    dtype = getattr(torch, spec.dtype)
    if not spec.num_elements:
        return torch.empty(spec.shape, dtype=dtype)
    bucket, offset = layout.bucket_of[number]
    words = flats[bucket][offset : offset + spec.num_words]
    return words.view(dtype)[: spec.num_elements].view(spec.shape)


def flats_from_words(layout: Layout, words: Sequence[bytearray]) -> list[torch.Tensor]:
    """Bucket memory that shares the bytes of a snapshot's words."""
    return [torch.frombuffer(data, dtype=_dtype(b.kind)) for b, data in zip(layout.buckets, words, strict=True)]


def state_tensors(layout: Layout, words: Sequence[bytearray] | Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict that a snapshot's words (or a replica's flats) hold: every name, aliases of tied tensors included.

    The tensors are views of the memory given."""
    flats = [w if isinstance(w, torch.Tensor) else None for w in words]
    memory = [f for f in flats if f is not None] or flats_from_words(layout, words)  # type: ignore[arg-type]
    return {
        name: tensor_view(layout, memory, number)
        for number, spec in enumerate(layout.tensors)
        if spec.persistent
        for name in spec.names
    }


def load_words(model: nn.Module, layout: Layout, words: Sequence[bytearray]) -> None:
    """Copy a snapshot's words into a module of the same layout, buffers that are not in the state dict included.

    Raises LayoutError when the module lacks a tensor or has it in another shape."""
    flats = flats_from_words(layout, words)
    live = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for number, spec in enumerate(layout.tensors):
            target = live.get(spec.name)
            if target is None or tuple(target.shape) != spec.shape:
                have = "nothing" if target is None else list(target.shape)
                raise LayoutError(f"the snapshot's {spec.name} is {list(spec.shape)}; the model has {have}")
            target.copy_(tensor_view(layout, flats, number))


def named_bytes(tensors: dict[str, torch.Tensor]) -> Iterator[NamedBytes]:
    """The tensors of a state dict as the digest sees them."""
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield NamedBytes(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.numpy().data)


def _live(found: _Found) -> torch.Tensor:
    tensor = (found.owner._parameters if found.is_parameter else found.owner._buffers)[found.leaf]
    if tensor is None or tuple(tensor.shape) != found.spec.shape:
        raise LayoutError(
            f"{found.spec.name} changed its shape from {list(found.spec.shape)} to "
            f"{None if tensor is None else list(tensor.shape)}"
        )
    return tensor


def _find(model: nn.Module, optimizer: OptimizerSection) -> list[_Found]:
    """Every distinct tensor of the model with all its names, in registration order."""
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[nn.Module, str, torch.Tensor, bool]] = {}
    for name, owner, leaf, tensor, is_parameter in _walk(model):
        names.setdefault(id(tensor), []).append(name)
        first.setdefault(id(tensor), (owner, leaf, tensor, is_parameter))
    persistent = set(model.state_dict(keep_vars=True))
    return [
        _Found(_spec(names[key], tensor, is_parameter, persistent, optimizer), owner, leaf, is_parameter)
        for key, (owner, leaf, tensor, is_parameter) in first.items()
    ]


def _walk(model: nn.Module) -> Iterable[tuple[str, nn.Module, str, torch.Tensor, bool]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for store, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for leaf, tensor in store.items():
                if tensor is not None:
                    yield (f"{prefix}.{leaf}" if prefix else leaf), module, leaf, tensor, is_parameter


def _spec(
    names: list[str], tensor: torch.Tensor, is_parameter: bool, persistent: set[str], optimizer: OptimizerSection
) -> TensorSpec:
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise LayoutError(
            f"{names[0]} is lazy", action="run the model once in build_model, so that its shapes are known"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    kind: BucketKind
    if is_parameter:
        kind = "trained" if tensor.requires_grad else "frozen"
    else:
        kind = "averaged" if tensor.is_floating_point() else "carried"
    if dtype not in ITEM_BYTES or (kind in ("trained", "averaged") and dtype != "float32"):
        raise LayoutError(
            f"{names[0]} is {dtype}: trainable parameters and floating-point buffers must be float32",
            action="build the model in float32; autocast may compute in a narrower type",
        )
    exempt = any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in optimizer.no_decay)
    decay = kind == "trained" and not exempt and (tensor.ndim >= 2 or optimizer.decay_norms_and_biases)
    return TensorSpec(
        names=tuple(names),
        shape=tuple(tensor.shape),
        dtype=dtype,
        kind=kind,
        decay=decay,
        persistent=any(name in persistent for name in names),
    )


def _dtype(kind: str) -> torch.dtype:
    return torch.float32 if kind in ("trained", "averaged") else torch.int32
