"""How a tensor of a model lies in the words of its bucket: in C order, in another memory format, or in parts.

A dense tensor is one run of words. A sparse one is several dense tensors, its indices and values, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from pscluster.step.layout import Form, Layout, Part, TensorSpec, padded

_COMPRESSED: dict[torch.layout, Form] = {
    torch.sparse_csr: "csr", torch.sparse_csc: "csc", torch.sparse_bsr: "bsr", torch.sparse_bsc: "bsc",
}  # fmt: skip
_LAYOUTS = {form: layout for layout, form in _COMPRESSED.items()}
# The order of dimensions in memory, outermost first.
_ORDERS: dict[Form, tuple[int, ...]] = {"channels_last": (0, 2, 3, 1), "channels_last_3d": (0, 2, 3, 4, 1)}


def form_of(tensor: torch.Tensor) -> Form | None:
    """The form in which a tensor's words are kept; None: there is none for it (quantised, nested, of a vendor)."""
    if tensor.is_quantized or tensor.is_nested:
        return None
    if tensor.layout == torch.sparse_coo:
        return "coo" if tensor.is_coalesced() else "coo_uncoalesced"
    if tensor.layout in _COMPRESSED:
        return _COMPRESSED[tensor.layout]
    return "" if tensor.layout == torch.strided else None


def memory_format_of(tensor: torch.Tensor) -> Form:
    """The form that keeps a dense tensor's memory format: C order for all but the formats of torch that differ."""
    for form, order in _ORDERS.items():
        if tensor.ndim == len(order) and tensor.stride() == _strides(tensor.shape, order):
            return form if tensor.stride() != _strides(tensor.shape, range(tensor.ndim)) else ""
    return ""


def dtype_of(tensor: torch.Tensor) -> str:
    """torch's name without "torch."."""
    return str(tensor.dtype).removeprefix("torch.")


def dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a tensor consists of, which share its memory: itself, or indices and values."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def parts_of(tensor: torch.Tensor) -> tuple[Part, ...]:
    """What a layout says of a sparse tensor's parts; nothing of a dense one."""
    parts = dense_parts(tensor)
    return () if parts[0] is tensor else tuple(Part(dtype_of(part), tuple(part.shape)) for part in parts)


def part_views(layout: Layout, flats: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    """The dense parts of tensor `number` of the layout as views of its bucket's memory."""
    spec = layout.tensors[number]
    if not spec.parts:
        return [tensor_view(layout, flats, number)]
    bucket, offset = layout.bucket_of.get(number, (0, 0))  # without a word it has no place
    views = []
    for part in spec.parts:
        views.append(_view(flats[bucket][offset : offset + part.num_words], part.dtype, part.shape))
        offset += padded(part.num_words)
    return views


def tensor_view(layout: Layout, flats: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    """Tensor `number` of the layout in its own dtype, shape and form, over its bucket's memory."""
    spec = layout.tensors[number]
    if spec.parts:
        return _assemble(spec, part_views(layout, flats, number))
    bucket, offset = layout.bucket_of.get(number, (0, 0))  # without an element it may have no place
    words = flats[bucket][offset : offset + spec.num_words]
    order = _ORDERS.get(spec.form)
    if order is None:
        return _view(words, spec.dtype, spec.shape)
    inner = _view(words, spec.dtype, tuple(spec.shape[dimension] for dimension in order))
    return inner.permute([order.index(dimension) for dimension in range(len(order))])


def flat_words(spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as they lie in the bucket, one-dimensional; shares memory where they lie so already."""
    order = _ORDERS.get(spec.form)
    return (tensor if order is None else tensor.permute(order)).contiguous().reshape(-1)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two dense tensors of one dtype and shape hold the same bytes: NaN equals itself, -0.0 is not 0.0."""
    return torch.equal(_as_integers(left), _as_integers(right))


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))


def _view(words: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if not prod(shape):
        return torch.empty(shape, dtype=kind, device=words.device)
    return words.view(kind)[: prod(shape)].view(shape)


def _assemble(spec: TensorSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if spec.form in _LAYOUTS:
        outer, inner, values = parts
        return torch.sparse_compressed_tensor(
            outer, inner, values, spec.shape, layout=_LAYOUTS[spec.form], check_invariants=False
        )
    indices, values = parts
    return torch.sparse_coo_tensor(indices, values, spec.shape, is_coalesced=spec.form == "coo", check_invariants=False)


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor whose dimensions lie in this order, outermost first."""
    strides, step = [0] * len(shape), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= max(shape[dimension], 1)
    return tuple(strides)
