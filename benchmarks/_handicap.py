"""A worker at half speed: it computes every forward and backward twice and uses one of them.

The same for a rank of DDP (`twice`) and for a trainer (`Handicapped`) on the worker that `WORKER` names, which is known
from the directory of the bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psworker.tasks.synthetic import SyntheticLm

WORKER = "worker-1"
Loss = Callable[[nn.Module, Tensor], tuple[Tensor, float]]


def twice(loss: Loss) -> Loss:
    """`loss`, after a forward and backward without effect: no hook fires, nothing is accumulated."""

    def slow(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        plain = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        wasted, _ = loss(plain, batch)
        if wasted.requires_grad:
            torch.autograd.grad(wasted, [p for p in plain.parameters() if p.requires_grad])
        return loss(model, batch)

    return slow


class Handicapped(SyntheticLm):
    """The benchmarks' language model, at half speed on one of the workers."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        if WORKER in Path(__file__).parts:
            self.loss = twice(super().loss)  # type: ignore[method-assign]
