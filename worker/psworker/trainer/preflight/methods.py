"""Methods of a task that nobody calls: misspellings of what pscluster calls, and hooks of other frameworks."""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
from collections.abc import Iterator
from types import FunctionType

from pscluster.errors import TaskError
from pscluster.task import Task

HOOKS = tuple(name for name, value in vars(Task).items() if isinstance(value, FunctionType) and name[0] != "_")
_OURS = ("pscluster.", "psworker.")
_CLOSE = 0.8  # "finalize", "train_dataset" and "val_data" are closer to a hook; "eval_data_path" and "loss_fn" are not

# What PyTorch Lightning, Keras and the transformers Trainer call, and what does its work here.
_OTHERS = {
    "configure_optimizers": "train.optimizer and train.schedule of the spec",
    "create_optimizer": "train.optimizer of the spec",
    "create_scheduler": "train.schedule of the spec",
    "optimizer_step": "train.optimizer of the spec",
    "lr_scheduler_step": "train.schedule of the spec",
    "configure_gradient_clipping": "train.clip_norm of the spec",
    "clip_gradients": "train.clip_norm of the spec",
    "training_step": "loss()",
    "train_step": "loss()",
    "compute_loss": "loss()",
    "validation_step": "metrics() and finalise()",
    "eval_step": "metrics() and finalise()",
    "evaluation_step": "metrics() and finalise()",
    "test_step": "metrics() and finalise()",
    "compute_metrics": "metrics() and finalise()",
    "predict_step": "generate()",
    "forward": "build_model(), which returns the module, and loss(), which calls it",
    "configure_model": "build_model()",
    "train_dataloader": "train_data() and collate()",
    "get_train_dataloader": "train_data() and collate()",
    "val_dataloader": "eval_data() and collate()",
    "test_dataloader": "eval_data() and collate()",
    "get_eval_dataloader": "eval_data() and collate()",
    "validation_data": "eval_data()",
    "training_epoch_end": "finalise()",
    "validation_epoch_end": "finalise()",
    "on_train_start": "__init__()",
    "on_train_epoch_end": "finalise()",
    "on_validation_epoch_end": "finalise()",
    "prepare_data": "train_data()",
    "setup": "__init__()",
}


def check_methods(task: Task) -> tuple[list[str], str]:
    """(a warning for each method of the user's that only another framework would call; the hooks that are defined).

    Raises TaskError for a misspelling of a hook. A method that the task's own module mentions is a helper, whatever its
    name, and so is one beside the hook that it resembles."""
    kind = type(task)
    defined = [hook for hook in HOOKS if getattr(kind, hook) is not getattr(Task, hook)]
    uncalled = list(_uncalled(kind))
    meant = {name: hook for name in uncalled if (hook := _meant(name)) and hook not in defined}
    if meant:
        questions = " ".join(f"{name}() is never called; did you mean {hook}()?" for name, hook in meant.items())
        raise TaskError(f"{kind.__name__}: {questions}", action="rename the method; a helper's name may begin with _")
    ignored = [
        f"{kind.__name__}.{name}() is never called: pscluster has {_OTHERS[name]} for it"
        for name in uncalled
        if name in _OTHERS
    ]
    return ignored, ", ".join(defined)


def _meant(name: str) -> str:
    """The hook of which `name` is a misspelling; empty: of none."""
    if name in _OTHERS:
        return ""
    plain = {_plain(hook): hook for hook in HOOKS}
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=_CLOSE)
    if not near or difflib.SequenceMatcher(None, near[0], _plain(name)).ratio() <= _CLOSE:
        return ""
    return plain[near[0]]


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _uncalled(kind: type[Task]) -> Iterator[str]:
    """The public methods of the user's classes that nobody is seen to call: hooks are not among them, nor methods of
    another base, which may call them, nor what the module of their class mentions."""
    known = {name for base in kind.__mro__ if not _is_users(base) for name in vars(base)}
    for owner in filter(_is_users, kind.__mro__):
        skipped = known | _mentioned(owner)
        for name, value in vars(owner).items():
            if isinstance(value, FunctionType | staticmethod | classmethod) and name[0] != "_" and name not in skipped:
                yield name


def _is_users(kind: type) -> bool:
    return issubclass(kind, Task) and kind is not Task and not kind.__module__.startswith(_OURS)


def _mentioned(owner: type) -> set[str]:
    """Every attribute and text in the source of a class's module: what its code may call."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[owner.__module__]))
    except (OSError, TypeError, SyntaxError):  # made without a file
        return set()
    nodes = list(ast.walk(tree))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
