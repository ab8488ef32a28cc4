"""The tensors of a model: each found once, with all its names and places, or refused by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from pscluster.errors import LayoutError
from pscluster.job.optimizer import OptimizerSection
from pscluster.step.layout import ITEM_BYTES, BucketKind, TensorSpec
from psworker.tensor_words import dtype_of, form_of, memory_format_of, parts_of

UnfreezeAt = Mapping[str, int]


@dataclass(frozen=True)
class FoundTensor:
    """One tensor of a model under all its names.

    `tensors`: the objects that are it. A parameter may be several, which share memory; `places[i]` is the module and
    the key that the i-th name stands for."""

    spec: TensorSpec
    is_parameter: bool
    places: tuple[tuple[nn.Module, str], ...]
    tensors: tuple[torch.Tensor, ...]


class Place(NamedTuple):
    """One name of one tensor: the module that holds it and its key there."""

    name: str
    owner: nn.Module
    leaf: str
    tensor: torch.Tensor
    is_parameter: bool


@dataclass
class _Tensor:
    """What stands for one tensor of the layout while a model is walked."""

    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)


def find_tensors(model: nn.Module, optimizer: OptimizerSection, unfreeze_at: UnfreezeAt) -> list[FoundTensor]:
    """Every distinct tensor of the model, in registration order. Parameters of exactly the same memory are one.

    Raises LayoutError naming the tensor for what cannot be laid out."""
    check_kinds(model)
    grouped: dict[tuple[object, ...], _Tensor] = {}
    for place in places_of(model):
        one = grouped.setdefault(_identity(place), _Tensor())
        one.names.append(place.name)
        one.places.append((place.owner, place.leaf))
        one.tensors.setdefault(id(place.tensor), place.tensor)
    check_overlaps(model)
    persistent = set(model.state_dict(keep_vars=True))
    return [
        FoundTensor(
            _spec(one, key[0] == "parameter", persistent, optimizer, unfreeze_at),
            key[0] == "parameter",
            tuple(one.places),
            tuple(one.tensors.values()),
        )
        for key, one in grouped.items()
    ]


def parameters_by_memory(model: nn.Module) -> list[tuple[list[str], list[nn.Parameter]]]:
    """The names of each parameter, and the objects that are it because they have exactly the same memory."""
    grouped: dict[tuple[object, ...], tuple[list[str], dict[int, nn.Parameter]]] = {}
    for place in places_of(model):
        if isinstance(place.tensor, nn.Parameter):
            names, parameters = grouped.setdefault(_identity(place), ([], {}))
            names.append(place.name)
            parameters[id(place.tensor)] = place.tensor
    return [(names, list(parameters.values())) for names, parameters in grouped.values()]


def parameter_names(model: nn.Module) -> set[str]:
    """Every name of every parameter."""
    return {place.name for place in places_of(model) if place.is_parameter}


def places_of(model: nn.Module) -> Iterator[Place]:
    """Every name of every parameter and buffer, in the order in which the modules register them."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for store, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for leaf, tensor in store.items():
                if tensor is not None:
                    yield Place(f"{prefix}.{leaf}" if prefix else leaf, module, leaf, tensor, is_parameter)


def trains_from(names: Iterable[str], unfreeze_at: UnfreezeAt) -> int | None:
    """The step that a parameter of these names is thawed at: the first of those that its names are given."""
    known = list(names)
    steps = [step for glob, step in unfreeze_at.items() if any(fnmatch.fnmatchcase(name, glob) for name in known)]
    return min(steps, default=None)


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a tensor gets its shape from the first batch."""
    return isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)


# ---- what has no layout ----


def check_kinds(model: nn.Module) -> None:
    """Raises LayoutError for a tensor without values, and for one whose memory cannot be laid out."""
    for place in places_of(model):
        kind, tensor = "parameter" if place.is_parameter else "buffer", place.tensor
        if tensor.is_meta:
            raise LayoutError(
                f"the {kind} {place.name} is on the meta device: it has no values",
                action="build the model on the CPU, without torch.device('meta'), or call model.to_empty(device='cpu') "
                "and initialise it in build_model",
            )
        if is_lazy(tensor):
            continue
        if place.is_parameter and tensor.layout != torch.strided:
            raise LayoutError(
                f"the parameter {place.name} is {str(tensor.layout).removeprefix('torch.')}: only dense ones train",
                action="make it a dense parameter; a constant sparse matrix can be a buffer",
            )
        if form_of(tensor) is None or (place.is_parameter and form_of(tensor) != ""):
            raise LayoutError(
                f"the {kind} {place.name} is quantised or nested: its memory has no layout",
                action="keep its integers and scales as buffers, or build it as a dense tensor",
            )


def check_overlaps(model: nn.Module) -> None:
    """Raises LayoutError naming two tensors for memory that they share in part, or that a buffer shares with a
    parameter: they could not be kept equal."""
    by_storage: dict[int, list[Place]] = {}
    seen: set[tuple[object, ...]] = set()
    for place in places_of(model):
        tensor = place.tensor
        if is_lazy(tensor) or tensor.layout != torch.strided or not tensor.numel() or _identity(place) in seen:
            continue
        seen.add(_identity(place))
        if place.is_parameter and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise LayoutError(
                f"the parameter {place.name} is expanded: several of its elements are one",
                action="make it a parameter of the smaller shape, and expand it in forward",
            )
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(place)
    for places in by_storage.values():
        if any(place.is_parameter for place in places) and not _follow_one_another(places):
            _check_apart(places)


def check_views(model: nn.Module) -> None:
    """Raises LayoutError for a plain attribute of a module that shares memory with a parameter: the parameter gets
    other memory, and the attribute would keep the first values. Called after a loss, which may have made it anew."""
    parameters = {id(place.tensor): place for place in places_of(model) if place.is_parameter}
    storages = {
        one.tensor.untyped_storage().data_ptr(): one
        for one in parameters.values()
        if one.tensor.layout == torch.strided and one.tensor.numel()
    }
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if not isinstance(tensor, torch.Tensor) or id(tensor) in parameters or tensor.layout != torch.strided:
                    continue
                shared = storages.get(tensor.untyped_storage().data_ptr()) if not is_lazy(tensor) else None
                if shared is not None:
                    raise LayoutError(
                        f"the attribute {f'{prefix}.{name}' if prefix else name} shares the memory of the parameter "
                        f"{shared.name}",
                        action="compute it from the parameter in forward",
                    )


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a storage that a dense tensor uses, and the one behind its last."""
    last = sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (last + 1) * tensor.element_size()


def _follow_one_another(places: list[Place]) -> bool:
    ranges = sorted(_bytes_of(place.tensor) for place in places)
    return all(stop <= start for (_, stop), (start, _) in pairwise(ranges))


def _check_apart(places: list[Place]) -> None:
    """Mark each tensor's elements, which may lie between those of another, in a picture of the storage."""
    unit = min(place.tensor.element_size() for place in places)
    marks = torch.zeros(max(_bytes_of(place.tensor)[1] for place in places) // unit, dtype=torch.int32)
    for number, place in enumerate(places, 1):
        tensor, size = place.tensor, place.tensor.element_size() // unit
        strides = (*(size * stride for stride in tensor.stride()), 1)
        mine = marks.as_strided((*tensor.shape, size), strides, size * tensor.storage_offset())
        other = int(mine.max())
        if other and (place.is_parameter or places[other - 1].is_parameter):
            _refuse_pair(places[other - 1], place)
        mine.fill_(number)


def _refuse_pair(one: Place, other: Place) -> None:
    what = ["parameter" if place.is_parameter else "buffer" for place in (one, other)]
    raise LayoutError(
        f"the {what[0]} {one.name} and the {what[1]} {other.name} share a part of their memory",
        action="use one Parameter in both places to tie them, .clone() to part them, or compute one from the other in "
        "forward",
    )


def _identity(place: Place) -> tuple[object, ...]:
    """What tensors that are one have in common. Parameters are one by their memory, buffers by the object."""
    tensor = place.tensor
    if not place.is_parameter or is_lazy(tensor) or tensor.layout != torch.strided or not tensor.numel():
        return ("parameter" if place.is_parameter else "buffer", id(tensor))
    return ("parameter", tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


# ---- the specification of one tensor ----


def _spec(
    one: _Tensor, is_parameter: bool, persistent: set[str], optimizer: OptimizerSection, unfreeze_at: UnfreezeAt
) -> TensorSpec:
    names, tensor = one.names, next(iter(one.tensors.values()))
    if is_lazy(tensor):
        raise LayoutError(
            f"{names[0]} is lazy, and the loss of one batch did not give it a shape",
            action="run the model once in build_model, so that its shapes are known",
        )
    trains = any(tensor.requires_grad for tensor in one.tensors.values()) or trains_from(names, unfreeze_at) is not None
    kind = _kind(tensor, is_parameter, trains)
    dtype = dtype_of(tensor)
    if dtype not in ITEM_BYTES or (kind == "trained" and dtype != "float32"):
        raise LayoutError(
            f"{names[0]} is {dtype}: trainable parameters must be float32",
            action="build the model in float32, or freeze the parameter; autocast may compute in a narrower type",
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
        form=memory_format_of(tensor) if is_parameter else form_of(tensor) or "",
        parts=parts_of(tensor),
    )


def _kind(tensor: torch.Tensor, is_parameter: bool, trains: bool) -> BucketKind:
    """How a step treats it. A buffer is averaged if it is float32, and carried if it counts; others are constants."""
    if is_parameter:
        return "trained" if trains else "frozen"
    if tensor.layout != torch.strided or tensor.is_complex():
        return "frozen"
    if tensor.is_floating_point():
        return "averaged" if tensor.dtype == torch.float32 else "frozen"
    return "carried"
