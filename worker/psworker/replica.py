"""A trainer's replica of the model: the module's tensors bound to flat bucket memory that values land in.

Parameters are views of their bucket, so that receiving a bucket sets them. Buffers stay the module's own: see
`live_buffers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pscluster.errors import LayoutError
from pscluster.job.optimizer import OptimizerSection
from pscluster.step.layout import WORD_BYTES, Layout, NamedBytes, Span, parameters_sha256
from pscluster.wire.memory import Arena, Segment, page_offsets
from psworker.live_buffers import LiveBuffers
from psworker.model_tensors import FoundTensor, UnfreezeAt, find_tensors, trains_from
from psworker.staging import Staging
from psworker.tensor_words import dense_parts, dtype_of, part_views, tensor_view

NEVER: UnfreezeAt = {}


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


def layout_of(model: nn.Module, optimizer: OptimizerSection, unfreeze_at: UnfreezeAt = NEVER) -> Layout:
    """The layout of a model, in the order in which its modules register their tensors. A parameter that `unfreeze_at`
    matches is trained, whatever its `requires_grad` is now.

    Raises LayoutError naming the tensor for what cannot be trained exactly: a trainable parameter that is not float32,
    a tensor without values or with memory that others share in part, a model without trainable parameters."""
    return _layout(find_tensors(model, optimizer, unfreeze_at))


def _layout(found: Sequence[FoundTensor]) -> Layout:
    if not any(f.spec.kind == "trained" for f in found):
        raise LayoutError("the model has no trainable parameter", action="return a model with requires_grad parameters")
    return Layout(tuple(f.spec for f in found))


class Replica:
    """`flats[b]` is bucket b where the model is: fp32 for trained and averaged buckets, int32 words for the raw ones.

    In host memory it is the bucket's part of `memory`, else a copy of it, which `load_bucket` makes.
    Whoever fills the flats of trained and frozen buckets sets the module's parameters. Autograd does
    not notice what is written there while a forward or backward runs: its result must then be dropped.

    `parameters`: every trained Parameter, with the number of its tensor; several may have the same one. `thaws`: those
    that train from a later step on; they require grad until `model_watch` says otherwise."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerSection,
        staging: Staging | None = None,
        unfreeze_at: UnfreezeAt = NEVER,
    ) -> None:
        self.model = model
        self._staging = staging or Staging()
        self.found = find_tensors(model, optimizer, unfreeze_at)
        self.layout = _layout(self.found)
        self.memory = BucketMemory(self.layout, windows=self._staging.is_host)
        self.flats = self.memory.flats
        self.device = str(next(model.parameters()).device)
        if not self._staging.is_host:
            self.flats = [flat.to(self.device) for flat in self.memory.flats]
            for flat in self.memory.flats:
                self._staging.pin(flat)
        self.parameters: dict[nn.Parameter, int] = {}
        self.thaws: dict[nn.Parameter, int] = {}
        for number, found in enumerate(self.found):
            self._fill(number, found)
            if found.is_parameter:
                self._bind(number, found, unfreeze_at)
        self.buffers = LiveBuffers(model, self.layout, self.found, self.flats)

    def _fill(self, number: int, found: FoundTensor) -> None:
        """Copy the tensor's value into its bucket."""
        with torch.no_grad():
            for part, view in zip(
                dense_parts(found.tensors[0]), part_views(self.layout, self.flats, number), strict=True
            ):
                view.copy_(part)
            if not self._staging.is_host:
                views = part_views(self.layout, self.memory.flats, number)
                for part, view in zip(dense_parts(found.tensors[0]), views, strict=True):
                    view.copy_(part)

    def _bind(self, number: int, found: FoundTensor, unfreeze_at: UnfreezeAt) -> None:
        """Make the parameters that are this tensor views of its bucket."""
        view, step = tensor_view(self.layout, self.flats, number), trains_from(found.spec.names, unfreeze_at)
        for parameter in found.tensors:
            assert isinstance(parameter, nn.Parameter)
            parameter.data = view
            if step is not None:
                parameter.requires_grad_(True)
                self.thaws[parameter] = step
            if parameter.requires_grad:
                self.parameters[parameter] = number

    def trained_buckets(self) -> dict[int, int]:
        """By id of a parameter: the bucket that holds it, if that is a trained one."""
        place = self.layout.bucket_of
        return {
            id(tensor): place[number][0]
            for number, found in enumerate(self.found)
            if found.spec.kind == "trained" and number in place
            for tensor in found.tensors
        }

    def load_bucket(self, bucket: int) -> None:
        """Make what landed in a bucket of `memory` visible to the model."""
        self._staging.copy_in(self.memory.flats[bucket], self.flats[bucket])

    def sha256(self) -> str:
        """Digest of the committed values of everything in the state dict."""
        return parameters_sha256(named_bytes(state_tensors(self.layout, self.flats)))


Words = Sequence[bytearray] | Sequence[torch.Tensor]  # of each bucket: a snapshot's, or a replica's flats


def _flats(layout: Layout, words: Words) -> list[torch.Tensor]:
    """Bucket memory that shares the bytes of the words."""
    buckets = zip(layout.buckets, words, strict=True)
    return [w if isinstance(w, torch.Tensor) else torch.frombuffer(w, dtype=_dtype(b.kind)) for b, w in buckets]


def state_tensors(layout: Layout, words: Words) -> dict[str, torch.Tensor]:
    """The state dict that a snapshot's words (or a replica's flats) hold: every name, aliases of tied tensors included.

    The tensors are views of the memory given."""
    memory = _flats(layout, words)
    return {
        name: tensor_view(layout, memory, number)
        for number, spec in enumerate(layout.tensors)
        if spec.persistent
        for name in spec.names
    }


def load_words(model: nn.Module, layout: Layout, words: Sequence[bytearray]) -> None:
    """Copy a snapshot's words into a module of the same layout, buffers that are not in the state dict included. A lazy
    tensor gets its shape from the layout.

    Raises LayoutError when the module lacks a tensor or has it in another shape."""
    flats = _flats(layout, words)
    live = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for number, spec in enumerate(layout.tensors):
            target = live.get(spec.name)
            if isinstance(target, nn.UninitializedParameter | nn.UninitializedBuffer):
                target.materialize(spec.shape, dtype=getattr(torch, spec.dtype))
            if target is None or tuple(target.shape) != spec.shape:
                have = "nothing" if target is None else list(target.shape)
                raise LayoutError(f"the snapshot's {spec.name} is {list(spec.shape)}; the model has {have}")
            mine, stored = dense_parts(target), part_views(layout, flats, number)
            if [part.shape for part in mine] != [part.shape for part in stored]:
                raise LayoutError(f"the snapshot's {spec.name} has other non-zero elements than the model's")
            for part, value in zip(mine, stored, strict=True):
                part.copy_(value)


def named_bytes(tensors: dict[str, torch.Tensor]) -> Iterator[NamedBytes]:
    """The tensors of a state dict as the digest sees them."""
    for name, tensor in tensors.items():
        parts = [
            part.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for part in dense_parts(tensor)
        ]
        yield NamedBytes(name, dtype_of(tensor), tuple(tensor.shape), parts[0] if len(parts) == 1 else b"".join(parts))


def _dtype(kind: str) -> torch.dtype:
    return torch.float32 if kind in ("trained", "averaged") else torch.int32
