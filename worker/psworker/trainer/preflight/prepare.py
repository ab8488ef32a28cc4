"""Everything that can be checked on a node before step 0, as one table of named checks.

`prepare` is what a trainer calls: it loads the task, builds the model, opens the data and runs every check.
Checks go on after a failure, so that a person sees all that is wrong at once."""

from __future__ import annotations

import platform
import sys
from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from pscluster.errors import ImpureError, InternalError, LayoutError
from pscluster.job.spec import JobSpec
from pscluster.step.sampling import ShardSampler
from pscluster.task import MapDataset, Task
from psworker.model_tensors import check_kinds, check_views, is_lazy, parameter_names
from psworker.numerics import arithmetic, numerics_class, precision
from psworker.replica import layout_of
from psworker.trainer.data.batches import data_fingerprint, preserved_generators, sampler_of
from psworker.trainer.data.loading import build_model, load_data, load_task
from psworker.trainer.first_model import copy_task, settle_model
from psworker.trainer.preflight.halving import halves_add_up
from psworker.trainer.preflight.loss import first_loss, first_metrics, smallest_batches
from psworker.trainer.preflight.methods import check_methods
from psworker.trainer.preflight.parameters import check_unwritten, traces
from psworker.trainer.preflight.probe import Computed, Probe, preserved_model
from psworker.trainer.preflight.purity import changed_state, check_purity, kept_state
from psworker.trainer.preflight.table import CheckResult, Table


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a trainer that passed reports to the master."""

    checks: tuple[CheckResult, ...]
    fingerprint: str
    numerics_class: str
    numerics_detail: str
    microbatch_digest: str


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A trainer ready for step 0. The model is on the device, in train mode, without gradients."""

    task: Task
    model: nn.Module
    train: MapDataset
    held_out: MapDataset | None
    sampler: ShardSampler
    preflight: Preflight


def prepare(spec: JobSpec, bundle_dir: Path | None, device: str) -> Prepared:
    """Load, build and check everything. `settle_numerics` must have run. Blocks for as long as user code does.

    Raises the failing check's own error, or PreflightError when several fail; `checks_of(error)` is the table."""
    table = Table()
    model = data = None
    task = table.run("imports", lambda: _imports(spec, bundle_dir))
    if task is not None and not _check_methods(table, task):
        task = None  # what a misspelt method was meant to replace would only confuse
    if task is not None:
        model = table.run("task", lambda: _model(task))
        data = table.run("data", lambda: _data(task, spec))
    if task is not None and model is not None and data is not None:
        model = table.run("trainable", partial(settle_model, task, model, data[0], spec, device))
    if task is None or model is None or data is None:
        table.run("versions", _versions)
        table.skip("loss", "needs the checks above")
        table.run("canary", lambda: _canary(spec, device))
        table.raise_failures()
        raise InternalError("a check that failed left no error")
    train, held_out, sampler = data
    preflight = run_preflight(task, model, train, held_out, spec, device, table)
    return Prepared(task=task, model=model, train=train, held_out=held_out, sampler=sampler, preflight=preflight)


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
    fingerprint = table.run("fingerprint", lambda: _fingerprint(train, held_out, spec))
    with preserved_generators(), preserved_model(model):
        probe = Probe(
            task=task, model=model, train=train, held_out=held_out, spec=spec, device=device,
            sampler=sampler_of(spec, len(train)),
        )  # fmt: skip
        first = _check_loss(table, probe)
        # After the loss, whose forward must not add parameters.
        table.run("layout", lambda: _layout(model, spec, named))
    canary = table.run("canary", lambda: _canary(spec, device))
    table.raise_failures()
    if fingerprint is None or canary is None or first is None:
        raise InternalError("a check that failed left no error")
    return Preflight(
        checks=tuple(table.checks),
        fingerprint=fingerprint,
        numerics_class=canary[0],
        numerics_detail=canary[1],
        microbatch_digest="" if spec.train.numerics == "mixed" else first.digest,
    )


def _check_loss(table: Table, probe: Probe) -> Computed | None:
    """All that computes; the first microbatch. What that shows to be wrong is not tried with others."""
    untouched = copy_task(probe.task)
    before = traces(probe.model)
    first = table.run("loss", lambda: first_loss(probe))
    kept = kept_state(probe.task, probe.model)
    evaluated = table.run("metrics", lambda: first_metrics(probe)) if first is not None else None
    steady = table.run("parameters", lambda: (True, check_unwritten(before, traces(probe.model))))
    if first is None or not steady:  # else all that follows would be computed with other parameters
        return None
    table.run("smallest", lambda: smallest_batches(probe, evaluated))
    accepted = (ImpureError,) if probe.spec.train.numerics == "mixed" else ()
    pure = table.run("purity", lambda: check_purity(probe, untouched, first, evaluated), accepted=accepted)
    if pure and (warning := changed_state(kept, kept_state(probe.task, probe.model))):
        table.warn("state", warning)
    if pure or accepted:
        table.run("halving", lambda: halves_add_up(probe, first.samples, is_pure=bool(pure)))
    else:
        table.skip("halving", "the task is not pure")
    return first


def _imports(spec: JobSpec, bundle_dir: Path | None) -> tuple[Task, str]:
    task = load_task(spec, bundle_dir)
    return task, f"{spec.task.entrypoint} from {getattr(sys.modules[type(task).__module__], '__file__', '?')}"


def _check_methods(table: Table, task: Task) -> bool:
    """Whether the task has no misspelt method; each that only another framework would call becomes a warning."""
    ignored = table.run("methods", lambda: check_methods(task))
    for warning in ignored or ():
        table.warn("methods", warning)
    return ignored is not None


def _model(task: Task) -> tuple[nn.Module, str]:
    model = build_model(task)
    check_kinds(model)
    count = sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
    lazy = sum(map(is_lazy, model.parameters()))
    return model, f"{type(model).__name__} with {count:,} parameters" + (f", {lazy} tensors lazy" if lazy else "")


def _data(task: Task, spec: JobSpec) -> tuple[tuple[MapDataset, MapDataset | None, ShardSampler], str]:
    train, held_out = load_data(task)
    sampler = sampler_of(spec, len(train))
    left_out = f" ({sampler.left_out:,} of them left out of each epoch by data.drop_last)" if sampler.left_out else ""
    counts = f"{len(train):,} training samples{left_out}, {len(held_out) if held_out else 0:,} held out"
    steps = f"{sampler.steps_per_epoch:,} step{'s' if sampler.steps_per_epoch != 1 else ''} an epoch"
    return (train, held_out, sampler), f"{counts}; {steps}"


def _versions() -> tuple[None, str]:
    ours = metadata.version("pscluster")
    return None, f"python {platform.python_version()}, torch {torch.__version__}, pscluster {ours}"


def _fingerprint(train: MapDataset, held_out: MapDataset | None, spec: JobSpec) -> tuple[str, str]:
    """Of the lengths alone where samples differ at each reading, and the user has declared that they may."""
    fingerprint = data_fingerprint(train, held_out)
    if spec.train.numerics == "mixed" and data_fingerprint(train, held_out) != fingerprint:
        fingerprint = data_fingerprint(range(len(train)), range(len(held_out)) if held_out is not None else None)
        return fingerprint, f"{fingerprint} of the numbers of samples alone: their contents differ at each reading"
    return fingerprint, fingerprint


def _layout(model: nn.Module, spec: JobSpec, named: Set[str]) -> tuple[None, str]:
    """`named`: the parameters before the loss was computed."""
    now = parameter_names(model)
    for name in sorted(now ^ named):
        raise LayoutError(
            f"forward {'adds' if name in now else 'removes'} the parameter {name}",
            action="give the module all its parameters in its constructor, or use one of torch's lazy modules",
        )
    check_views(model)
    layout = layout_of(model, spec.train.optimizer, spec.train.unfreeze_at)
    buckets = len(layout.buckets)
    sizes = f"{len(layout.tensors)} tensors in {buckets} bucket{'s' if buckets > 1 else ''}"
    averaged = sum(tensor.kind == "averaged" for tensor in layout.tensors)
    if averaged:
        sizes += f"; {averaged} buffers averaged by weight over microbatches, each of which is normalised by itself"
    return None, sizes


def _canary(spec: JobSpec, device: str) -> tuple[tuple[str, str], str]:
    digest, detail = numerics_class(spec.workers.threads, device, arithmetic(spec), precision(spec, device))
    return (digest, detail), f"{digest[:12]} on {detail}"
