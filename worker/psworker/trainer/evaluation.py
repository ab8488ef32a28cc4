"""What loss() and metrics() return, checked against their contract and turned into statistics that add."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pscluster.errors import LossContractError, TaskError
from pscluster.spelling import did_you_mean
from pscluster.step.tree import Statistics, TreeNode, add_statistics, tree_of
from pscluster.task import Task
from psworker.live_buffers import preserved_buffers
from psworker.trainer.data.batches import EvalBatches
from psworker.trainer.data.loading import user_code
from psworker.trainer.data.moving import to_device
from psworker.trainer.gradients.accumulate import Counter

LOSS_SUM, WEIGHT = "loss_sum", "weight"


def loss_of(task: Task, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    """Call the task's loss. Gives (loss_sum: 0-dim floating tensor, weight: finite and not negative).

    A weight of 0 is a batch without targets and is fine. Raises TaskError with the user's traceback, or
    LossContractError with what was returned instead."""
    with user_code("loss"):
        returned = task.loss(model, batch)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise LossContractError(f"loss() returned {_shape_of(returned)}, not a pair (loss_sum, weight)")
    loss_sum, weight = returned
    if not isinstance(loss_sum, Tensor) or loss_sum.dim() != 0 or not loss_sum.is_floating_point():
        raise LossContractError(
            f"loss() returned {_shape_of(loss_sum)} as loss_sum, not a floating-point scalar tensor",
            action="sum it: reduction='sum', or .sum() over the unreduced losses",
        )
    return loss_sum, _weight(weight)


def _weight(weight: object) -> float:
    scalar = isinstance(weight, Tensor) and weight.numel() == 1
    if not (scalar or (isinstance(weight, Real) and not isinstance(weight, bool))):
        raise LossContractError(f"loss() returned {_shape_of(weight)} as weight, not a number")
    value = float(weight.detach() if isinstance(weight, Tensor) else weight)  # type: ignore[arg-type]
    if not math.isfinite(value) or value < 0:
        raise LossContractError(f"loss() returned the weight {value}; it must be finite and not negative")
    return value


def batch_statistics(task: Task, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The statistics of one held-out batch: "loss_sum", "weight" and what metrics() returned, sorted by name.

    Each is a float64 CPU tensor of the shape the task gave it; adding them over batches is exact whatever
    the worker. The caller has put the model into eval mode and seeded. Raises TaskError, LossContractError."""
    with torch.no_grad():
        loss_sum, weight = loss_of(task, model, batch)
        with user_code("metrics"):
            returned = task.metrics(model, batch)
    if not isinstance(returned, Mapping):
        raise TaskError(f"metrics() returned {_shape_of(returned)}, not a mapping of names to numbers or tensors")
    statistics = {LOSS_SUM: _float64(LOSS_SUM, loss_sum), WEIGHT: _float64(WEIGHT, weight)}
    for name, value in returned.items():
        if name in (LOSS_SUM, WEIGHT):
            raise TaskError(f"metrics() returned {name!r}, which is kept for what loss() returned")
        statistics[str(name)] = _float64(str(name), value)
    return dict(sorted(statistics.items()))


def finalised(task: Task, statistics: Mapping[str, Tensor]) -> dict[str, float]:
    """The metrics people read, by name, from added statistics. "loss" is the mean and always there.

    Raises TaskError when finalise() raises or returns something else than numbers by name."""
    weight = float(statistics[WEIGHT])
    metrics = {"loss": float(statistics[LOSS_SUM]) / weight if weight else math.nan}
    with user_code("finalise"):
        returned = task.finalise({name: value.clone() for name, value in statistics.items()})
    if not isinstance(returned, Mapping):
        raise TaskError(f"finalise() returned {_shape_of(returned)}, not a mapping of names to numbers")
    for name, value in returned.items():
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise TaskError(f"finalise() returned {_shape_of(value)} as {name!r}, not a number")
        metrics[str(name)] = float(value)
    return metrics


Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def pack_statistics(statistics: Mapping[str, Tensor]) -> tuple[Statistics, Shapes]:
    """The statistics as one float64 vector that adds, and what `unpack_metrics` needs to take it apart again."""
    shapes = tuple((name, tuple(value.shape)) for name, value in statistics.items())
    vectors = [value.reshape(-1).numpy() for value in statistics.values()]
    return np.concatenate(vectors), shapes


def unpack_metrics(task: Task, vector: Statistics, shapes: Shapes) -> dict[str, float]:
    """`finalised` of a vector that was added up over all shards. Raises TaskError."""
    expected = sum(math.prod(shape) for _, shape in shapes)
    if len(vector) != expected:
        raise TaskError(f"metrics() changed its shape: {len(vector)} numbers where {expected} were expected")
    statistics, place = {}, 0
    for name, shape in shapes:
        count = math.prod(shape)
        statistics[name] = torch.from_numpy(vector[place : place + count].copy()).reshape(shape)
        place += count
    return finalised(task, statistics)


def shard_statistics(
    task: Task, model: nn.Module, batches: EvalBatches, shard: int, device: str
) -> Iterator[tuple[Statistics, Shapes]]:
    """The running sum over the batches of one shard, after each batch; nothing for a shard without batches.

    What counts is the last one. A generator, so that the caller can do other work between batches.
    The model is in eval mode while it runs and in its former mode afterwards. Raises TaskError, LossContractError."""
    was_training = model.training
    total: Statistics = np.empty(0)
    try:
        for batch, _ in batches.of_shard(shard):
            model.eval()
            packed, shapes = pack_statistics(batch_statistics(task, model, to_device(batch, device)))
            if total.size and total.shape != packed.shape:
                raise TaskError(f"metrics() changed its shape: {packed.size} numbers, before {total.size}")
            total = total + packed if total.size else packed
            yield total, shapes
    finally:
        model.train(was_training)


def evaluate(task: Task, model: nn.Module, batches: EvalBatches, device: str) -> dict[str, float]:
    """The metrics of a model over all shards, added in the job's tree: the bits of the job's own evaluation."""
    tree = tree_of(batches.num_shards)
    counter = Counter(tree, add_statistics)
    counter.begin([tree.root])
    shapes: Shapes = ()
    for shard in range(batches.num_shards):
        with preserved_buffers(model):
            last = deque(shard_statistics(task, model, batches, shard, device), maxlen=1)
        whole = counter.carry(TreeNode(shard, 1), last[0][0] if last else np.empty(0))
        shapes = shapes or (last[0][1] if last else ())
    return unpack_metrics(task, whole[0][1], shapes)


def check_metric(metrics: Mapping[str, float], wanted: str) -> None:
    """Raise TaskError, naming the nearest, unless evaluate.metric `wanted` is among `metrics`."""
    if wanted in metrics:
        return
    hint = did_you_mean(wanted, metrics) or f"; there are: {', '.join(sorted(metrics))}"
    raise TaskError(
        f"evaluate.metric {wanted!r} is not among the task's metrics{hint}",
        action="correct evaluate.metric, or return it from the task's finalise()",
    )


def _float64(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device="cpu", dtype=torch.float64)
    if isinstance(value, Real):
        return torch.tensor(float(value), dtype=torch.float64)
    raise TaskError(f"metrics() returned {_shape_of(value)} as {name!r}, not a number or tensor")


def _shape_of(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"
