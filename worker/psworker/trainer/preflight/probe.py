"""Computes single microbatches as the training loop does, and notes everything that went in and came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from pscluster.errors import LossContractError, NonFiniteError
from pscluster.job.spec import JobSpec
from pscluster.step.sampling import ShardSampler
from pscluster.task import MapDataset, Task
from psworker.live_buffers import preserved_buffers
from psworker.numerics import precision
from psworker.trainer.data.batches import Batches, EvalBatches, generators_checksum, seed_step
from psworker.trainer.data.loading import user_code
from psworker.trainer.data.moving import to_device
from psworker.trainer.evaluation import batch_statistics, loss_of
from psworker.trainer.preflight.content import Leaf, Leaves, leaves_of


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Leaves of a microbatch: of its samples, by the name of each, before anything used them, and of the batch."""

    samples: Mapping[str, Leaves]
    batch: Leaves


@dataclass(frozen=True, kw_only=True)
class Computed:
    """One microbatch from its samples to its results.

    `results`: loss, weight and each gradient, or each statistic. `read_draws`, `draws`: checksums of the generators
    after the samples were read, and at the end; they are seeded anew in between."""

    samples: Sequence[Any]
    inputs: Inputs
    results: Leaves
    read_draws: int
    draws: int
    loss_sum: float = math.nan
    weight: float = math.nan
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hex digest of the results: equal where loss, weight and gradients have equal bits."""
        text = "\n".join(f"{leaf.path} {leaf.kind} {leaf.checksum}" for leaf in self.results)
        return blake2b(text.encode(), digest_size=16, person=b"ps-microbatch").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the checks of the loss share."""

    task: Task
    model: nn.Module
    train: MapDataset
    held_out: MapDataset | None
    spec: JobSpec
    device: str
    sampler: ShardSampler

    def train_microbatch(self, step: int, shard: int, which: str = "first") -> Computed:
        """Forward and backward in train mode, from the first buffers.

        Raises LossContractError, NonFiniteError, and what user code raises as a TaskError."""
        self.model.train()
        batch, recorder = self._read_microbatch(step, shard)
        with preserved_buffers(self.model):
            with precision(self.spec, self.device):
                loss_sum, weight = loss_of(self.task, self.model, to_device(batch, self.device))
            self._check(loss_sum, which)
            with user_code("backward"):
                loss_sum.backward()  # type: ignore[no-untyped-call]
        gradients = [
            leaf for name, p in self.model.named_parameters() for leaf in leaves_of(p.grad, f"gradient {name}")
        ]
        self.model.zero_grad(set_to_none=True)
        value = float(loss_sum.detach())
        results = [*leaves_of(value, "the loss"), *leaves_of(weight, "the weight"), *gradients]
        return recorder.computed(results, loss_sum=value, weight=weight)

    def other_microbatch(self) -> tuple[int, int] | None:
        """(step, shard) of another microbatch than the first; None: the job has none."""
        train, sampler = self.spec.train, self.sampler
        final_step = sampler.final_step(train.max_steps, train.epochs)
        places = [(0, 1)] if train.num_shards > 1 else []
        places += [(1, 0)] if final_step > 1 else []
        return next((place for place in places if sampler.indices(*place)), None)

    def held_out_batch(self, number: int) -> Computed:
        """The statistics of one held-out batch, in eval mode. There must be one. Raises as evaluation does."""
        self.model.eval()
        batch, recorder = self._read_held_out(number)
        with preserved_buffers(self.model), precision(self.spec, self.device):
            statistics = batch_statistics(self.task, self.model, to_device(batch, self.device))
        results = [leaf for name, value in statistics.items() for leaf in leaves_of(value, f"the statistic {name}")]
        return recorder.computed(results, statistics=statistics)

    def train_inputs(self) -> Inputs:
        """The first microbatch, read and collated only."""
        return self._read_microbatch(0, 0)[1].inputs

    def held_out_inputs(self) -> Inputs:
        """The first held-out batch, read and collated only."""
        return self._read_held_out(0)[1].inputs

    def _read_microbatch(self, step: int, shard: int) -> tuple[Any, _Recorder]:
        indices = self.sampler.indices(step, shard)
        recorder = _Recorder(self.task.collate, [f"sample {n} of train_data" for n in indices])
        return Batches(self.train, recorder, self.sampler, self.spec.train.seed).microbatch(step, shard)[0], recorder

    def _read_held_out(self, number: int) -> tuple[Any, _Recorder]:
        indices = self.held_out_batches(self.task.collate).indices(number)
        recorder = _Recorder(self.task.collate, [f"sample {n} of eval_data" for n in indices])
        return self.held_out_batches(recorder).batch(number)[0], recorder

    def held_out_batches(self, collate: Callable[[Sequence[Any]], Any]) -> EvalBatches:
        assert self.held_out is not None
        train = self.spec.train
        return EvalBatches(self.held_out, collate, train.num_shards, train.microbatch, train.seed)

    def loss_in_eval(self, samples: Sequence[Any]) -> tuple[float, float]:
        """(loss_sum, weight) of samples in eval mode, without gradients. The caller has seeded."""
        self.model.eval()
        with user_code("collate"):
            batch = to_device(self.task.collate(samples), self.device)
        with torch.no_grad(), preserved_buffers(self.model), precision(self.spec, self.device):
            loss_sum, weight = loss_of(self.task, self.model, batch)
        return float(loss_sum), weight

    def read_ends(self) -> None:
        """Read the last and the first training sample: what a data set does when it is begun again is then done."""
        seed_step(self.spec.train.seed, 0, 0)
        for index in (len(self.train) - 1, 0):
            with user_code(f"reading sample {index} of train_data", data=True):
                self.train[index]

    def _check(self, loss_sum: Tensor, which: str) -> None:
        if not loss_sum.requires_grad:
            raise LossContractError(
                "loss() returned a loss_sum that does not require grad",
                action="compute it from the model's output, without .item(), .detach() or torch.no_grad()",
            )
        if not torch.isfinite(loss_sum) and self.spec.on_nonfinite == "stop":
            raise NonFiniteError(f"the loss of the {which} microbatch is {float(loss_sum.detach())}")


class _Recorder:
    """A collate that notes what it receives and returns: `samples` and `inputs` are there once it was called."""

    samples: Sequence[Any]
    inputs: Inputs

    def __init__(self, collate: Callable[[Sequence[Any]], Any], names: Sequence[str]) -> None:
        self._collate = collate
        self._names = names
        self._draws = 0

    def __call__(self, samples: Sequence[Any]) -> Any:
        self.samples = samples
        self._draws = generators_checksum()
        # Of each sample alone: two that share a value are no cycle.
        leaves = {name: leaves_of(sample) for name, sample in zip(self._names, samples, strict=True)}
        batch = self._collate(samples)
        self.inputs = Inputs(samples=leaves, batch=leaves_of(batch))
        return batch

    def computed(self, results: Sequence[Leaf], **facts: Any) -> Computed:
        return Computed(
            samples=self.samples,
            inputs=self.inputs,
            results=tuple(results),
            read_draws=self._draws,
            draws=generators_checksum(),
            **facts,
        )


@contextmanager
def preserved_model(model: nn.Module) -> Iterator[None]:
    """Put modes and buffers back on leaving, also where forward replaced one, and drop gradients."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with preserved_buffers(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        model.zero_grad(set_to_none=True)
