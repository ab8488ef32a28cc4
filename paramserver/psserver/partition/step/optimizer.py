"""The optimizer's pass over one bucket's span: scale, then a fused update, chunk by chunk while in cache.

A chunk is at most 128 Ki elements and starts on a multiple of 16 elements of the bucket, so that the bits do not
depend on where it starts. Tensors that are neighbours and share decay and age go together as one run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pscluster.job.spec import OptimizerSection, ScheduleSection
from pscluster.step.layout import BLOCK_WORDS, Layout, Span, padded
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

    `update_count`: updates applied to these tensors before this one; `decay`: weight decay applies."""

    start: int
    stop: int
    update_count: int
    decay: bool


def moments_of(optimizer: OptimizerSection) -> int:
    """How many fp32 words of state an element has beside its value."""
    if optimizer.name == "sgd":
        return 1 if optimizer.momentum else 0
    return 2


def runs(layout: Layout, span: Span, update_counts: Sequence[int], touched: Sequence[bool]) -> list[Run]:
    """The runs of a trained bucket's span, in order. Tensors that no microbatch touched are left out, as plain
    PyTorch leaves out a parameter whose gradient is None."""
    found: list[Run] = []
    for placed in layout.buckets[span.bucket].placed:
        tensor = layout.tensors[placed.tensor]
        start = max(placed.offset, span.start) - span.start
        stop = min(placed.offset + padded(tensor.num_words), span.stop) - span.start
        if start >= stop or not touched[placed.tensor]:
            continue
        update_count, decay = update_counts[placed.tensor], tensor.decay
        last = found[-1] if found else None
        if last and last.stop == start and last.update_count == update_count and last.decay == decay:
            found[-1] = Run(last.start, stop, update_count, decay)
        else:
            found.append(Run(start, stop, update_count, decay))
    return found


def update_span(
    optimizer: OptimizerSection,
    run_list: Sequence[Run],
    values: torch.Tensor,
    gradient: torch.Tensor,
    moments: Sequence[torch.Tensor],
    *,
    scale: float,
    lr: float,
) -> None:
    """Update `values` and `moments` in place from the summed `gradient`, which is overwritten.

    All tensors are one-dimensional, of the span's length; fp32, but the gradient, which may be narrower and is widened
    chunk by chunk. `scale` is clip coefficient / weight."""
    for run in run_list:
        for start in range(run.start, run.stop, CHUNK_WORDS):
            part = slice(start, min(start + CHUNK_WORDS, run.stop))
            chunk = gradient[part] if gradient.dtype == torch.float32 else gradient[part].float()
            chunk.mul_(scale)
            state = [moment[part] for moment in moments]
            if optimizer.name == "sgd":
                _sgd(optimizer, values[part], chunk, state, run, lr)
            else:
                _adam(optimizer, values[part], chunk, state, run, lr)


def _adam(
    optimizer: OptimizerSection,
    value: torch.Tensor,
    gradient: torch.Tensor,
    moments: Sequence[torch.Tensor],
    run: Run,
    lr: float,
) -> None:
    """Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019), torch's fused kernels."""
    # The kernel reads the count of this update and does not advance it.
    step = torch.tensor(float(run.update_count + 1))
    kernel = torch._fused_adamw_ if optimizer.name == "adamw" else torch._fused_adam_
    kernel(
        [value],
        [gradient],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        lr=lr,
        beta1=optimizer.betas[0],
        beta2=optimizer.betas[1],
        weight_decay=optimizer.weight_decay if run.decay else 0.0,
        eps=optimizer.eps,
        amsgrad=False,
        maximize=False,
    )


def _sgd(
    optimizer: OptimizerSection,
    value: torch.Tensor,
    gradient: torch.Tensor,
    moments: Sequence[torch.Tensor],
    run: Run,
    lr: float,
) -> None:
    """SGD with optional momentum and Nesterov's variant (Sutskever et al., 2013), torch's fused kernel."""
    torch._fused_sgd_(
        [value],
        [gradient],
        [moments[0]] if moments else [],
        weight_decay=optimizer.weight_decay if run.decay else 0.0,
        momentum=optimizer.momentum,
        lr=lr,
        dampening=0.0,
        nesterov=optimizer.nesterov,
        maximize=False,
        is_first_step=run.update_count == 0,
    )


def learning_rate(base: float, schedule: ScheduleSection, step: int, final_step: int) -> float:
    """Rate of the update that makes version `step` + 1 of `final_step`.

    Warm-up is linear and reaches `base` at update number `warmup_steps`. The cosine (Loshchilov and Hutter, 2017,
    without restarts) falls from `base` to `final_ratio * base` over the steps after it."""
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return base
    length = max(1, final_step - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / length)
    floor = schedule.final_ratio
    return base * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


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
            update_span(optimizer, run_list, values, gradient, moments, scale=0.37, lr=1e-2)
        for tensor in (values, *moments):
            digest.update(tensor.numpy().data)
    detail = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return digest.hexdigest(), detail
