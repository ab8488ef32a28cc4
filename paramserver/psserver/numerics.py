"""The numerics class of a partition's host: the hash of a small optimizer step."""

from __future__ import annotations

import hashlib

import torch

from pscluster.job.spec import OptimizerSection
from pscluster.step.layout import BLOCK_WORDS
from psserver.partition.step.optimizer import Run, moments_of, update_span
from psserver.partition.step.sums import block_squares

_CANARY = (
    OptimizerSection(name="adamw", weight_decay=0.1),
    OptimizerSection(name="adam", weight_decay=0.1),
    OptimizerSection(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.1),
)


def settle_numerics() -> None:
    """One intra-op thread, deterministic kernels. Before the first use of torch."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.set_deterministic_debug_mode("error")  # the same switch, without importing the compiler (1.3 s)


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
