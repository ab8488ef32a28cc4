"""What the first and the smallest batches show about loss() and metrics()."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pscluster.errors import LossContractError, TaskError
from psworker.trainer.evaluation import check_metric, finalised, pack_statistics
from psworker.trainer.preflight.probe import Computed, Probe


def first_loss(probe: Probe) -> tuple[Computed, str]:
    """One forward and backward in train mode, as step 0 will do it."""
    first = probe.train_microbatch(0, 0)
    if first.weight <= 0:
        raise LossContractError(f"loss() returned the weight {first.weight} for a batch of {len(first.samples)}")
    if all(leaf.kind == "NoneType" for leaf in first.results if leaf.path.startswith("gradient ")):
        raise LossContractError("no parameter of the model has a gradient after backward")
    return first, f"{first.loss_sum / first.weight:.4f} = {first.loss_sum:.6g} / {first.weight:g}"


def first_metrics(probe: Probe) -> tuple[Computed | None, str]:
    """The statistics of the first held-out batch, and the metrics they would give."""
    if probe.held_out is None:
        return None, "skipped: no held-out data"
    first = probe.held_out_batch(0)
    metrics = finalised(probe.task, first.statistics)
    check_metric(metrics, probe.spec.evaluate.metric)
    return first, ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))


def smallest_batches(probe: Probe, evaluated: Computed | None) -> tuple[None, str]:
    """The smallest microbatch that the job will have, forward and backward, and the smallest held-out batch."""
    train, sampler = probe.spec.train, probe.sampler
    step, shard = sampler.smallest(sampler.final_step(train.max_steps, train.epochs))
    size = len(sampler.indices(step, shard))
    hint = (
        f"set data.drop_last: true, which leaves {_samples(size)} out of each epoch, or a train.microbatch that "
        f"divides the {sampler.num_samples:,} samples"
    )
    where = f"the smallest microbatch, {_samples(size)} at the end of an epoch"
    with _named(where, hint, size < train.microbatch):
        probe.train_microbatch(step, shard, "smallest")
    seen = f"{_samples(size)} in training"
    if evaluated is None:
        return None, seen
    batches = probe.held_out_batches(probe.task.collate)
    size = len(batches.indices(batches.num_batches - 1))
    hint = "evaluation uses every sample: loss() and metrics() must work for a batch of that size"
    with _named(f"the smallest batch of evaluation, {_samples(size)}", hint, size < train.microbatch):
        smallest = probe.held_out_batch(batches.num_batches - 1)
        if pack_statistics(smallest.statistics)[1] != pack_statistics(evaluated.statistics)[1]:
            raise TaskError("metrics() returned other names or shapes than for the first batch")
    return None, f"{seen}, {_samples(size)} in evaluation"


@contextmanager
def _named(which: str, hint: str, is_smaller: bool) -> Iterator[None]:
    """Say of which batch an error is. One of a full batch has nothing to do with its size, and passes unchanged."""
    try:
        yield
    except TaskError as error:
        if not is_smaller:
            raise
        raise type(error)(f"{which}: {error.cause}", action=hint, details=error.details) from error


def _samples(count: int) -> str:
    return f"{count:,} sample{'s' if count != 1 else ''}"
