"""Everything that can be checked on a node before step 0, as one table of named checks.

`prepare` is what a trainer calls: it loads the task, builds the model, opens the data and runs every check.
Checks go on after a failure, so that a person sees all that is wrong at once."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import crc32c
import torch
from torch import nn

from pscluster.errors import InternalError, LossContractError, NonFiniteError, PreflightError, PsError
from pscluster.job.spec import JobSpec
from pscluster.step.sampling import ShardSampler
from pscluster.task import MapDataset, Task
from psworker.numerics import arithmetic, numerics_class, precision
from psworker.replica import layout_of
from psworker.trainer.data.batches import data_fingerprint, preserved_generators, seed_step, to_device
from psworker.trainer.data.loading import build_model, load_data, load_task, user_code
from psworker.trainer.evaluation import batch_statistics, check_metric, finalised, loss_of

# A mean for a sum is wrong by a factor of two; honest float32 sums differ by about 1e-6, bf16 ones by its 8 bits.
_TOLERANCE, _NARROW_TOLERANCE = 1e-3, 3e-2


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
        model = table.run("task", lambda: _model(task, device))
        data = table.run("data", lambda: _data(task))
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
    table.run("versions", _versions)
    fingerprint = table.run("fingerprint", lambda: _fingerprint(train, held_out))
    with preserved_generators(), _preserved_model(model), precision(spec, device):
        samples = table.run("samples", lambda: _samples(train, spec))
        tolerance = _NARROW_TOLERANCE if spec.train.autocast else _TOLERANCE
        probe = _Probe(task=task, model=model, device=device, seed=spec.train.seed, tolerance=tolerance)
        if samples is not None:
            _check_loss(table, probe, samples, held_out, spec)
        # After the loss, whose forward gives lazy modules their shapes.
        table.run("layout", lambda: _layout(model, spec))
    canary = table.run("canary", lambda: _canary(spec, device))
    table.raise_failures()
    if fingerprint is None or canary is None:
        raise InternalError("a check that failed left no error")
    return Preflight(
        checks=tuple(table.checks), fingerprint=fingerprint, numerics_class=canary[0], numerics_detail=canary[1]
    )


def _check_loss(
    table: Table, probe: _Probe, samples: Sequence[Any], held_out: MapDataset | None, spec: JobSpec
) -> None:
    before = traces(probe.model)
    ran = table.run("loss", lambda: _loss(probe, samples, spec))
    if ran:
        table.run("metrics", lambda: _metrics(probe, held_out, spec))
    steady = table.run("parameters", lambda: (True, check_unwritten(before, traces(probe.model))))
    if ran and steady:  # else the halves would be computed with other parameters than the whole
        table.run("halving", lambda: _halving(probe, samples))


@dataclass(frozen=True, kw_only=True)
class _Probe:
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


def _imports(spec: JobSpec, bundle_dir: Path | None) -> tuple[Task, str]:
    task = load_task(spec, bundle_dir)
    return task, f"{spec.task.entrypoint} from {getattr(sys.modules[type(task).__module__], '__file__', '?')}"


def _model(task: Task, device: str) -> tuple[nn.Module, str]:
    model = build_model(task).to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    return model, f"{type(model).__name__} with {count:,} parameters"


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


def _loss(probe: _Probe, samples: Sequence[Any], spec: JobSpec) -> tuple[bool, str]:
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


def _halving(probe: _Probe, samples: Sequence[Any]) -> tuple[None, str]:
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
    if not _close(weight, left_weight + right_weight, _TOLERANCE):
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


def _metrics(probe: _Probe, held_out: MapDataset | None, spec: JobSpec) -> tuple[None, str]:
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


def _layout(model: nn.Module, spec: JobSpec) -> tuple[None, str]:
    layout = layout_of(model, spec.train.optimizer)
    buckets = len(layout.buckets)
    return None, f"{len(layout.tensors)} tensors in {buckets} bucket{'s' if buckets > 1 else ''}"


def _canary(spec: JobSpec, device: str) -> tuple[tuple[str, str], str]:
    digest, detail = numerics_class(spec.workers.threads, device, arithmetic(spec), precision(spec, device))
    return (digest, detail), f"{digest[:12]} on {detail}"


@contextmanager
def _preserved_model(model: nn.Module) -> Iterator[None]:
    """Put buffers and modes back on leaving, and drop gradients."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        for module, training in modes:
            module.training = training
        model.zero_grad(set_to_none=True)


# ---- the table, and writes to parameters ----


_MOST_NAMED = 3
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One line of the table. A check that does not apply is ok, with a detail that starts with "skipped"."""

    name: str
    ok: bool
    detail: str


class Table:
    """Runs checks one after another, keeps each result, and raises at the end."""

    def __init__(self) -> None:
        self.checks: list[CheckResult] = []
        self._failures: list[tuple[str, PsError]] = []

    def run(self, name: str, check: Callable[[], tuple[T, str]]) -> T | None:
        """The first of what `check` returns; its second is the detail. None when it raised a PsError."""
        try:
            value, detail = check()
        except PsError as error:
            self.checks.append(CheckResult(name=name, ok=False, detail=error.cause))
            self._failures.append((name, error))
            return None
        self.checks.append(CheckResult(name=name, ok=True, detail=detail))
        return value

    def skip(self, name: str, reason: str) -> None:
        """Note that a check could not be made."""
        self.checks.append(CheckResult(name=name, ok=True, detail=f"skipped: {reason}"))

    def raise_failures(self) -> None:
        """Raise the one failing check's own error, or PreflightError for several; `checks_of` reads the table back."""
        if not self._failures:
            return
        carried = json.dumps([asdict(check) for check in self.checks])
        if len(self._failures) == 1:
            error = self._failures[0][1]
            error.details["checks"] = carried
            raise error
        causes = "; ".join(f"{name}: {error.cause}" for name, error in self._failures)
        tracebacks = [error.details.get("traceback", "") for _, error in self._failures]
        raise PreflightError(
            f"{len(self._failures)} of {len(self.checks)} checks failed: {causes}",
            details={"checks": carried, "traceback": "\n".join(filter(None, tracebacks))},
        )


def checks_of(error: PsError) -> tuple[CheckResult, ...]:
    """The table that an error of the preflight carries; empty for any other error."""
    return tuple(CheckResult(**check) for check in json.loads(error.details.get("checks", "[]")))


# ---- writes to parameters ----


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a write to a parameter changes. Keeps the parameter alive, so that another cannot take its address.

    `version` also shows a write of the same bytes, as clamping within bounds is; `checksum` shows a write through
    `.data`, which torch does not count."""

    parameter: nn.Parameter
    address: int
    version: int
    checksum: int

    def is_of(self, other: Trace | None) -> bool:
        """Whether nothing was written between the two."""
        if other is None or other.parameter is not self.parameter:
            return False
        return (self.address, self.version, self.checksum) == (other.address, other.version, other.checksum)


def traces(model: nn.Module) -> dict[str, Trace]:
    """A trace of each parameter, frozen ones included. Left out are lazy ones, which have no values yet, and sparse
    ones, which no layout will have.

    Reads every parameter once, a CUDA model's through host memory, one tensor at a time."""
    return {
        name: Trace(
            parameter=parameter,
            address=parameter.data_ptr(),
            version=0 if parameter.is_inference() else parameter._version,
            checksum=_checksum(parameter),
        )
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, nn.UninitializedParameter) and parameter.layout == torch.strided
    }


def check_unwritten(before: Mapping[str, Trace], after: Mapping[str, Trace]) -> str:
    """What was compared, in words. Raises LossContractError naming the parameters that were written to or replaced."""
    written = [name for name, trace in before.items() if not trace.is_of(after.get(name))]
    if written:
        named = ", ".join(written[:_MOST_NAMED]) + (", ..." if len(written) > _MOST_NAMED else "")
        raise LossContractError(
            f"forward or backward writes to the parameter{'s' if len(written) > 1 else ''} {named}",
            action="constrain weights in the task's loss by computing a new tensor, e.g. "
            "torch.nn.functional.normalize(weight), instead of writing to the parameter (as max_norm of nn.Embedding "
            "does)",
        )
    return f"{len(before)} unchanged by forward and backward"


def _checksum(parameter: nn.Parameter) -> int:
    content = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return crc32c.crc32c(content.numpy().data)
