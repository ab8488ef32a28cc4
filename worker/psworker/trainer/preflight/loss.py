"""What the first microbatch shows about loss() and metrics()."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pscluster.errors import LossContractError, NonFiniteError
from pscluster.job.spec import JobSpec
from pscluster.task import MapDataset, Task
from psworker.trainer.data.batches import seed_step
from psworker.trainer.data.loading import user_code
from psworker.trainer.data.moving import to_device
from psworker.trainer.evaluation import batch_statistics, check_metric, finalised, loss_of

# A mean for a sum is wrong by a factor of two; honest float32 sums differ by about 1e-6, bf16 ones by its 8 bits.
TOLERANCE, NARROW_TOLERANCE = 1e-3, 3e-2


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the checks of the loss share."""

    task: Task
    model: nn.Module
    device: str
    seed: int
    tolerance: float

    def collate(self, samples: Sequence[Any]) -> Any:
        with user_code("collate"):
            return to_device(self.task.collate(samples), self.device)

    def loss_in_eval(self, samples: Sequence[Any]) -> tuple[float, float]:
        self.model.eval()
        batch = self.collate(samples)
        seed_step(self.seed, 0, 0)
        with torch.no_grad():
            loss_sum, weight = loss_of(self.task, self.model, batch)
        return float(loss_sum), weight


def first_loss(probe: Probe, samples: Sequence[Any], spec: JobSpec) -> tuple[bool, str]:
    """One forward and backward in train mode, as step 0 will do it."""
    probe.model.train()
    batch = probe.collate(samples)
    seed_step(probe.seed, 0, 0)
    loss_sum, weight = loss_of(probe.task, probe.model, batch)
    if not loss_sum.requires_grad:
        raise LossContractError(
            "loss() returned a loss_sum that does not require grad",
            action="compute it from the model's output, without .item(), .detach() or torch.no_grad()",
        )
    if weight <= 0:
        raise LossContractError(f"loss() returned the weight {weight} for a batch of {len(samples)}")
    value = float(loss_sum.detach())
    if not torch.isfinite(loss_sum) and spec.on_nonfinite == "stop":
        raise NonFiniteError(f"the loss of the first microbatch is {value}")
    with user_code("backward"):
        loss_sum.backward()  # type: ignore[no-untyped-call]
    if all(parameter.grad is None for parameter in probe.model.parameters()):
        raise LossContractError("no parameter of the model has a gradient after backward")
    return True, f"{value / weight:.4f} = {value:.6g} / {weight:g}"


def halves_add_up(probe: Probe, samples: Sequence[Any]) -> tuple[None, str]:
    """In eval mode, the loss_sum and weight of a batch must be those of its two halves added."""
    if len(samples) < 2:
        return None, "skipped: a microbatch has one sample"
    if not probe.task.loss_adds_up:
        return None, "skipped: the task says loss_adds_up = False"
    middle = len(samples) // 2
    whole, weight = probe.loss_in_eval(samples)
    (left, left_weight), (right, right_weight) = (
        probe.loss_in_eval(samples[:middle]),
        probe.loss_in_eval(samples[middle:]),
    )
    if not _close(weight, left_weight + right_weight, TOLERANCE):
        raise LossContractError(
            f"the weight of {len(samples)} samples is {weight:g}, but those of its halves are {left_weight:g} + "
            f"{right_weight:g}: the weight must count what was summed"
        )
    if not _close(whole, left + right, probe.tolerance):
        mean = _close(2 * whole, left + right, 0.2)
        raise LossContractError(
            f"the loss_sum of {len(samples)} samples is {whole:.6g}, but those of its halves are {left:.6g} + "
            f"{right:.6g}: " + ("loss() returns a mean" if mean else "loss() is not a sum over samples")
        )
    return None, f"{whole:.6g} = {left:.6g} + {right:.6g}"


def _close(whole: float, parts: float, tolerance: float) -> bool:
    return whole == parts or not abs(whole - parts) > tolerance * max(abs(whole), abs(parts))


def first_metrics(probe: Probe, held_out: MapDataset | None, spec: JobSpec) -> tuple[None, str]:
    if held_out is None:
        return None, "skipped: no held-out data"
    seed_step(probe.seed, 0, 0)
    with user_code("reading a sample of eval_data", data=True):
        samples = [held_out[index] for index in range(min(spec.train.microbatch, len(held_out)))]
    probe.model.eval()
    statistics = batch_statistics(probe.task, probe.model, probe.collate(samples))
    metrics = finalised(probe.task, statistics)
    check_metric(metrics, spec.evaluate.metric)
    return None, ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
