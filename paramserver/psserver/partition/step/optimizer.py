"""The optimizer's pass over one bucket's span: scale, then a fused update, chunk by chunk while in cache.

A chunk is at most 128 Ki elements and starts on a multiple of 16 elements of the bucket, so that the bits do not
depend on where it starts. Tensors that are neighbours and share group, decay and age go together as one run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from pscluster.job.optimizer import OptimizerSection
from pscluster.step.layout import BLOCK_WORDS, Layout, Span, padded
from psserver.partition.step.kernels import KERNELS, moments_of
from psserver.partition.step.sums import block_squares

CHUNK_WORDS = 128 * 1024
_CANARY = (
    OptimizerSection(name="adamw", weight_decay=0.1),
    OptimizerSection(name="adam", weight_decay=0.1),
    OptimizerSection(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.1),
)


@dataclass(frozen=True)
class Run:
    """Words start <= w < stop of a span (from the span's start) that one fused call may treat alike.

    `update_count`: updates applied to these tensors before this one; `decay`: weight decay applies, unless the group
    has one of its own; `group`: as `OptimizerSection.group_of`."""

    start: int
    stop: int
    update_count: int
    decay: bool
    group: int = -1


def runs(
    layout: Layout, span: Span, update_counts: Sequence[int], touched: Sequence[bool], groups: Sequence[int]
) -> list[Run]:
    """The runs of a trained bucket's span, in order. Tensors that no microbatch touched are left out, as plain
    PyTorch leaves out a parameter whose gradient is None. `groups`: of each tensor of the layout."""
    found: list[Run] = []
    for placed in layout.buckets[span.bucket].placed:
        tensor = layout.tensors[placed.tensor]
        start = max(placed.offset, span.start) - span.start
        stop = min(placed.offset + padded(tensor.num_words), span.stop) - span.start
        if start >= stop or not touched[placed.tensor]:
            continue
        alike = update_counts[placed.tensor], tensor.decay, groups[placed.tensor]
        last = found[-1] if found else None
        if last and last.stop == start and (last.update_count, last.decay, last.group) == alike:
            found[-1] = Run(last.start, stop, *alike)
        else:
            found.append(Run(start, stop, *alike))
    return found


def update_span(
    optimizer: OptimizerSection,
    run_list: Sequence[Run],
    values: torch.Tensor,
    gradient: torch.Tensor,
    moments: Sequence[torch.Tensor],
    *,
    scale: float,
    rates: Sequence[float],
    clip_value: float | None = None,
) -> None:
    """Update `values` and `moments` in place from the summed `gradient`, which is overwritten.

    All tensors are one-dimensional, of the span's length; fp32, but the gradient, which may be narrower and is widened
    chunk by chunk. `scale` is clip coefficient / weight; `rates`: the learning rate of each group, and last that of
    all others; `clip_value`: bounds each element of the scaled gradient."""
    kernel = KERNELS[optimizer.name]
    for run in run_list:
        section = _section_of(optimizer, run.group, run.decay)
        for start in range(run.start, run.stop, CHUNK_WORDS):
            part = slice(start, min(start + CHUNK_WORDS, run.stop))
            chunk = gradient[part] if gradient.dtype == torch.float32 else gradient[part].float()
            chunk.mul_(scale)
            if clip_value is not None:
                chunk.clamp_(-clip_value, clip_value)
            state = [moment[part] for moment in moments]
            kernel(section, values[part], chunk, state, run.update_count + 1, rates[run.group])


@lru_cache(maxsize=256)
def _section_of(optimizer: OptimizerSection, group: int, decay: bool) -> OptimizerSection:
    """What is in force for a run: the group's values, and no weight decay where a tensor has none."""
    section = optimizer.of_groups[group]
    has_own = group >= 0 and optimizer.groups[group].weight_decay is not None
    return section if decay or has_own else section.model_copy(update={"weight_decay": 0.0})


def numerics_class() -> tuple[str, str]:
    """(hex digest, what usually makes it differ): every optimizer's kernels, the norm's, over two updates."""
    digest = hashlib.sha256()
    num_words = BLOCK_WORDS + 16 * 7
    ramp = torch.arange(num_words, dtype=torch.float32)
    for optimizer in _CANARY:
        values = torch.sin(ramp)
        moments = [torch.zeros(num_words) for _ in range(moments_of(optimizer))]
        for update_count in range(2):
            gradient = torch.cos(ramp * (update_count + 1)) * 0.1
            for block, square in block_squares(gradient, 0).items():
                digest.update(f"{block}:{square.hex()}".encode())
            run_list = [Run(0, num_words, update_count, decay=True)]
            update_span(optimizer, run_list, values, gradient, moments, scale=0.37, rates=[1e-2])
        for tensor in (values, *moments):
            digest.update(tensor.numpy().data)
    detail = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return digest.hexdigest(), detail
