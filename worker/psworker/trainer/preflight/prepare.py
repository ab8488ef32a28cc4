"""Everything that can be checked on a node before step 0, as one table of named checks.

`prepare` is what a trainer calls: it loads the task, builds the model, opens the data and runs every check.
Checks go on after a failure, so that a person sees all that is wrong at once."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pscluster.errors import InternalError, LayoutError
from pscluster.job.spec import JobSpec
from pscluster.step.sampling import ShardSampler
from pscluster.task import MapDataset, Task
from psworker.live_buffers import preserved_buffers
from psworker.model_tensors import check_kinds, is_lazy, parameter_names
from psworker.numerics import arithmetic, numerics_class, precision
from psworker.replica import layout_of
from psworker.trainer.data.batches import data_fingerprint, preserved_generators, seed_step
from psworker.trainer.data.loading import build_model, load_data, load_task, user_code
from psworker.trainer.first_model import settle_model
from psworker.trainer.preflight.loss import NARROW_TOLERANCE, TOLERANCE, Probe, first_loss, first_metrics, halves_add_up
from psworker.trainer.preflight.parameters import check_unwritten, traces
from psworker.trainer.preflight.table import CheckResult, Table


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a trainer that passed reports to the master."""

    checks: tuple[CheckResult, ...]
    fingerprint: str
    numerics_class: str
    numerics_detail: str


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A trainer ready for step 0. The model is on the device, in train mode, without gradients."""

    task: Task
    model: nn.Module
    train: MapDataset
    held_out: MapDataset | None
    preflight: Preflight


def prepare(spec: JobSpec, bundle_dir: Path | None, device: str) -> Prepared:
    """Load, build and check everything. `settle_numerics` must have run. Blocks for as long as user code does.

    Raises the failing check's own error, or PreflightError when several fail; `checks_of(error)` is the table."""
    table = Table()
    model = data = None
    task = table.run("imports", lambda: _imports(spec, bundle_dir))
    if task is not None:
        model = table.run("task", lambda: _model(task))
        data = table.run("data", lambda: _data(task))
    if task is not None and model is not None and data is not None:
        model = table.run("trainable", partial(settle_model, task, model, data[0], spec, device))
    if task is None or model is None or data is None:
        table.run("versions", _versions)
        table.skip("loss", "needs the checks above")
        table.run("canary", lambda: _canary(spec, device))
        table.raise_failures()
        raise InternalError("a check that failed left no error")
    preflight = run_preflight(task, model, *data, spec, device, table)
    return Prepared(task=task, model=model, train=data[0], held_out=data[1], preflight=preflight)


def run_preflight(
    task: Task,
    model: nn.Module,
    train: MapDataset,
    held_out: MapDataset | None,
    spec: JobSpec,
    device: str,
    table: Table | None = None,
) -> Preflight:
    """The checks that need a model and data. Buffers, modes and generators are left as they were, and so are the
    parameters of a task that passes.

    Raises as `prepare` does."""
    table = table or Table()
    named = parameter_names(model)
    table.run("versions", _versions)
    fingerprint = table.run("fingerprint", lambda: _fingerprint(train, held_out))
    with preserved_generators(), _preserved_model(model), precision(spec, device):
        samples = table.run("samples", lambda: _samples(train, spec))
        tolerance = NARROW_TOLERANCE if spec.train.autocast else TOLERANCE
        probe = Probe(task=task, model=model, device=device, seed=spec.train.seed, tolerance=tolerance)
        if samples is not None:
            _check_loss(table, probe, samples, held_out, spec)
        # After the loss, whose forward gives lazy modules their shapes.
        table.run("layout", lambda: _layout(model, spec, named))
    canary = table.run("canary", lambda: _canary(spec, device))
    table.raise_failures()
    if fingerprint is None or canary is None:
        raise InternalError("a check that failed left no error")
    return Preflight(
        checks=tuple(table.checks), fingerprint=fingerprint, numerics_class=canary[0], numerics_detail=canary[1]
    )


def _check_loss(table: Table, probe: Probe, samples: Sequence[Any], held_out: MapDataset | None, spec: JobSpec) -> None:
    before = traces(probe.model)
    ran = table.run("loss", lambda: first_loss(probe, samples, spec))
    if ran:
        table.run("metrics", lambda: first_metrics(probe, held_out, spec))
    steady = table.run("parameters", lambda: (True, check_unwritten(before, traces(probe.model))))
    if ran and steady:  # else the halves would be computed with other parameters than the whole
        table.run("halving", lambda: halves_add_up(probe, samples))


def _imports(spec: JobSpec, bundle_dir: Path | None) -> tuple[Task, str]:
    task = load_task(spec, bundle_dir)
    return task, f"{spec.task.entrypoint} from {getattr(sys.modules[type(task).__module__], '__file__', '?')}"


def _model(task: Task) -> tuple[nn.Module, str]:
    model = build_model(task)
    check_kinds(model)
    count = sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
    lazy = sum(map(is_lazy, model.parameters()))
    return model, f"{type(model).__name__} with {count:,} parameters" + (f", {lazy} tensors lazy" if lazy else "")


def _data(task: Task) -> tuple[tuple[MapDataset, MapDataset | None], str]:
    train, held_out = load_data(task)
    return (train, held_out), f"{len(train):,} training samples, {len(held_out) if held_out else 0:,} held out"


def _versions() -> tuple[None, str]:
    ours = metadata.version("pscluster")
    return None, f"python {platform.python_version()}, torch {torch.__version__}, pscluster {ours}"


def _fingerprint(train: MapDataset, held_out: MapDataset | None) -> tuple[str, str]:
    fingerprint = data_fingerprint(train, held_out)
    return fingerprint, fingerprint


def _samples(train: MapDataset, spec: JobSpec) -> tuple[list[Any], str]:
    sampler = ShardSampler(len(train), spec.train.num_shards, spec.train.microbatch, spec.train.seed)
    seed_step(spec.train.seed, 0, 0)
    with user_code("reading a sample of train_data", data=True):
        samples = [train[index] for index in sampler.indices(0, 0)]
    return samples, f"{len(samples)} in a microbatch, {sampler.steps_per_epoch:,} steps an epoch"


def _layout(model: nn.Module, spec: JobSpec, named: Set[str]) -> tuple[None, str]:
    """`named`: the parameters before the loss was computed."""
    now = parameter_names(model)
    for name in sorted(now ^ named):
        raise LayoutError(
            f"forward {'adds' if name in now else 'removes'} the parameter {name}",
            action="give the module all its parameters in its constructor, or use one of torch's lazy modules",
        )
    layout = layout_of(model, spec.train.optimizer, spec.train.unfreeze_at)
    return None, f"{len(layout.tensors)} tensors in {len(layout.buckets)} buckets"


def _canary(spec: JobSpec, device: str) -> tuple[tuple[str, str], str]:
    digest, detail = numerics_class(spec.workers.threads, device, arithmetic(spec), precision(spec, device))
    return (digest, detail), f"{digest[:12]} on {detail}"


@contextmanager
def _preserved_model(model: nn.Module) -> Iterator[None]:
    """Put buffers and modes back on leaving, and drop gradients."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with preserved_buffers(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        model.zero_grad(set_to_none=True)
