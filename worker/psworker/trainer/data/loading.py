"""The user's task, from the entry point in a spec to an object whose failures carry the user's own traceback."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

import psworker.tasks
from pscluster.agent.position import position
from pscluster.errors import DataError, OutOfMemoryError, PsError, TaskError
from pscluster.job.spec import JobSpec
from pscluster.spelling import did_you_mean
from pscluster.task import MapDataset, Task
from pscluster.user_frames import user_traceback


def load_task(spec: JobSpec, bundle_dir: Path | None) -> Task:
    """Import the entry point, with `bundle_dir` first on sys.path (for good), and make the task.

    Raises TaskError, with the user's traceback in details["traceback"], when the import, the lookup of the
    class or its constructor fails; DataError when the constructor misses a file."""
    module_name, _, class_name = spec.task.entrypoint.partition(":")
    if bundle_dir is not None:
        path = str(bundle_dir.resolve())
        sys.path[:] = [path, *(other for other in sys.path if other != path)]
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True  # the directory stays as it was submitted
    _seed_generators(spec.train.seed)
    module = _import(module_name, bundle_dir)
    kind = _find_class(module, class_name)
    _check_args(kind, spec)
    return make_task(kind, spec)


def make_task(kind: type[Task], spec: JobSpec) -> Task:
    """A task of this class, from seeded generators. Raises TaskError, or DataError when it misses a file."""
    _seed_generators(spec.train.seed)
    with user_code(f"{kind.__name__}(...)", data=True):
        task = kind(**spec.task.args)
    task.data_uri = spec.data.uri
    task.seed = spec.train.seed
    return task


def build_model(task: Task) -> nn.Module:
    """The task's model, freshly initialised from the job's seed, on the CPU. Raises TaskError."""
    _seed_generators(task.seed)
    with user_code("build_model"):
        model = task.build_model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"build_model() returned {type(model).__name__}, not a torch.nn.Module")
    return model


def load_data(task: Task) -> tuple[MapDataset, MapDataset | None]:
    """The task's (training, held-out) data. Raises DataError when they are missing or empty, else TaskError.

    The generators are seeded alike for both, so that both may divide the same samples at random, each for itself."""
    _seed_generators(task.seed)
    with user_code("train_data", data=True):
        train = task.train_data()
    _seed_generators(task.seed)
    with user_code("eval_data", data=True):
        held_out = task.eval_data()
    if _length(train, "train_data") == 0:
        raise DataError(f"train_data() has no samples (data.uri is {task.data_uri!r})")
    if held_out is not None and _length(held_out, "eval_data") == 0:
        raise DataError("eval_data() has no samples; return None for a job without evaluation")
    return train, held_out


def _seed_generators(seed: int) -> None:
    """The global generators of torch, numpy and `random`: whatever a task draws is the same in every process."""
    torch.manual_seed(seed)
    np.random.seed([seed & 0xFFFF_FFFF, seed >> 32])
    random.seed(seed)


@contextmanager
def user_code(what: str, *, data: bool = False) -> Iterator[None]:
    """Around a call of user code: whatever it raises, SystemExit and KeyboardInterrupt included, becomes a TaskError
    that says `what` was called.

    details["traceback"] has the user's own frames. With `data`, an OSError becomes a DataError; want of memory becomes
    an OutOfMemoryError. Errors of our own tree pass unchanged. The process's position says that user code runs."""
    try:
        with position.calling(what):
            yield
    except PsError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        details = {"traceback": user_traceback(error)}
        if ran_out_of_memory(error):
            raise OutOfMemoryError(f"{what} ran out of memory: {describe(error)}", details=details) from error
        kind = DataError if data and isinstance(error, OSError) else TaskError
        raise kind(f"{what} raised {describe(error)}", details=details) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch could not have memory. torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def describe(error: BaseException) -> str:
    """ "Type: message" in one line, at most 300 characters."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:300]


def _import(name: str, bundle_dir: Path | None) -> ModuleType:
    try:
        with position.calling(f"import {name}"):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only when the entry point's own module is missing; a missing import inside it is the user's
        # traceback.
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _import_error(name, error) from error
        where = "the submitted directory and the installed packages" if bundle_dir else "the installed packages"
        raise TaskError(
            f"task.entrypoint: no module {name!r} in {where}{did_you_mean(name, _modules(bundle_dir))}"
        ) from None
    except PsError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        raise _import_error(name, error) from error


def _modules(bundle_dir: Path | None) -> list[str]:
    """The modules that an entry point may name: those in the bundle, without one the built-in tasks."""
    if bundle_dir is not None:
        return [path.stem for path in bundle_dir.glob("*.py")]
    return [f"{psworker.tasks.__name__}.{found.name}" for found in pkgutil.iter_modules(psworker.tasks.__path__)]


def _import_error(name: str, error: BaseException) -> TaskError:
    return TaskError(f"importing {name} raised {describe(error)}", details={"traceback": user_traceback(error)})


def _find_class(module: ModuleType, name: str) -> type[Task]:
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Task) and found is not Task:
        return found
    tasks = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, Task) and v is not Task]
    hint = did_you_mean(name, tasks) or f"; its tasks: {', '.join(tasks) or 'none'}"
    if found is not None:
        raise TaskError(f"task.entrypoint: {module.__name__}:{name} is not a subclass of pscluster.task.Task{hint}")
    raise TaskError(f"task.entrypoint: {module.__name__} has no {name}{hint}")


def _check_args(kind: type[Task], spec: JobSpec) -> None:
    """A misspelt task.args key is named before the constructor sees it."""
    parameters = inspect.signature(kind).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in spec.task.args:
        if key not in parameters:
            hint = did_you_mean(key, parameters) or f"; it takes {', '.join(parameters) or 'none'}"
            raise TaskError(f"task.args: {kind.__name__} takes no {key!r}{hint}")


def _length(dataset: MapDataset, what: str) -> int:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TaskError(
            f"{what}() returned {type(dataset).__name__}, which is not a map-style data set "
            "(it needs __len__ and __getitem__)"
        )
    with user_code(f"len({what}())", data=True):
        return len(dataset)
