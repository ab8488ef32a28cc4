"""From the model that a task builds to the one that trains: lazy modules get their shapes, what the spec freezes is
frozen, and the model moves to its device. The same values in every process: a pure function of spec and data."""

from __future__ import annotations

import copy
import fnmatch
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from pscluster.errors import SpecError, TaskError
from pscluster.job.spec import JobSpec
from pscluster.spelling import did_you_mean
from pscluster.task import MapDataset, Task
from psworker.live_buffers import preserved_buffers
from psworker.model_tensors import check_overlaps, is_lazy, parameters_by_memory, trains_from
from psworker.trainer.data.batches import preserved_generators, sampler_of, seed_step
from psworker.trainer.data.loading import build_model, make_task, user_code

_MOST_COPIED = 1 << 16  # what is longer holds data


def settle_model(task: Task, model: nn.Module, train: MapDataset, spec: JobSpec, device: str) -> tuple[nn.Module, str]:
    """The model, ready for the first step, and what of it trains, in words.

    Raises TaskError when the loss that gives lazy modules their shapes fails, SpecError for a pattern of train.freeze
    or train.unfreeze_at that matches no parameter, LayoutError for memory that two tensors share in part."""
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        _materialise(task, model, train, spec)
    detail = freeze(model, spec)
    check_overlaps(model)
    shared = parameters_by_memory(model)
    with user_code("moving the model to its device"):
        model = model.to(device)
    for _, (first, *others) in shared:
        for other in others:  # moved one by one, they would be parted
            other.data = first.data
    return model, detail


def copy_task(task: Task) -> Task:
    """A copy in which attributes may be set, and its containers filled, without a trace in `task`. What they hold is
    the same: data are not copied."""
    twin = copy.copy(task)
    for name, value in vars(task).items():
        if isinstance(value, dict | list | set | deque) and len(value) <= _MOST_COPIED:
            vars(twin)[name] = copy.copy(value)
    return twin


def build_anew(task: Task, model: nn.Module, spec: JobSpec) -> tuple[Task, nn.Module]:
    """A second model beside `model`, on the CPU, and the task that built it: a copy of `task`, which does not change.
    Where that gives parameters of `model` again, as when the constructor builds the model, a task that is made anew.

    Raises TaskError, also where that one gives them again."""
    known = {id(parameter) for parameter in model.parameters()}
    twin = copy_task(task)
    built = build_model(twin)
    if any(id(parameter) in known for parameter in built.parameters()):
        twin = make_task(type(task), spec)
        built = build_model(twin)
    if any(id(parameter) in known for parameter in built.parameters()):
        raise TaskError(
            "build_model() returned parameters that it has returned before",
            action="build the model in build_model(), not while the module is imported",
        )
    return twin, built


def freeze(model: nn.Module, spec: JobSpec) -> str:
    """Set `requires_grad` as it is at step 0; what trains when, in words. Raises SpecError."""
    freeze_globs, unfreeze_at = spec.train.freeze, spec.train.unfreeze_at
    known = parameters_by_memory(model)
    every_name = [name for names, _ in known for name in names]
    for key, globs in (("freeze", freeze_globs), ("unfreeze_at", unfreeze_at)):
        for glob in globs:
            if not fnmatch.filter(every_name, glob):
                raise SpecError(f"train.{key}: {glob!r} matches no parameter of the model{_near(glob, every_name)}")
    later: dict[int, int] = {}
    for names, parameters in known:
        step = trains_from(names, unfreeze_at)
        is_frozen = any(fnmatch.filter(names, glob) for glob in freeze_globs)
        if step is not None:
            later[step] = later.get(step, 0) + 1
        if is_frozen or step is not None:
            for parameter in parameters:
                parameter.requires_grad_(False)
    return _described(known, later)


def _described(known: Sequence[tuple[Sequence[str], Sequence[nn.Parameter]]], later: dict[int, int]) -> str:
    trains = [any(p.requires_grad for p in parameters) for _, parameters in known]
    text = f"{sum(trains)} of {len(known)} parameters train"
    text += "".join(f", {count} more from step {step} on" for step, count in sorted(later.items()))
    frozen = len(known) - sum(trains) - sum(later.values())
    return f"{text}, {frozen} {'is' if frozen == 1 else 'are'} frozen" if frozen else text


def _near(glob: str, names: Iterable[str]) -> str:
    """The nearest name, or the nearest beginning of one where the pattern ends with a star."""
    known = set(names)
    if glob.endswith("*"):
        known |= {".".join(name.split(".")[:depth]) + ".*" for name in known for depth in range(1, name.count(".") + 1)}
    return did_you_mean(glob, sorted(known))


def _materialise(task: Task, model: nn.Module, train: MapDataset, spec: JobSpec) -> None:
    """Run the loss of the first microbatch without gradients: in eval mode, which moves no statistics, and in train
    mode for what eval mode leaves out."""
    sampler = sampler_of(spec, len(train))
    modes = [(module, module.training) for module in model.modules()]
    with preserved_generators(), torch.no_grad():
        seed_step(spec.train.seed, 0, 0)
        with user_code("reading a sample of train_data", data=True):
            samples = [train[index] for index in sampler.indices(0, 0)]
        with user_code("collate"):
            batch = task.collate(samples)
        for mode in (False, True):
            if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
                model.train(mode)
                seed_step(spec.train.seed, 0, 0)
                with preserved_buffers(model), user_code("loss, of a batch that gives lazy modules their shapes,"):
                    task.loss(model, batch)
    for module, training in modes:
        module.training = training
