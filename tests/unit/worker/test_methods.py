"""A method that nobody calls is told from a helper: misspelt hooks are refused, hooks of other frameworks named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pscluster.errors import TaskError
from pscluster.task import Task
from psworker.trainer.preflight.methods import check_methods
from psworker.trainer.preflight.prepare import prepare
from psworker.trainer.preflight.table import checks_of

BASE = """
import torch
from pscluster import Task

class Base(Task):
    def build_model(self): return torch.nn.Linear(1, 1)
    def train_data(self): return [torch.ones(1)] * 16
    def loss(self, model, batch): return model(batch).square().sum(), len(batch)

class Mine(Base):
    pass
"""


@pytest.fixture
def task_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The task of a module that ends with these lines, in the body of its class."""

    def task_of(*lines: str) -> Any:
        (tmp_path / "methodical.py").write_text(BASE + "".join(f"    {line}\n" for line in lines))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "methodical", raising=False)
        return __import__("methodical").Mine()

    return task_of


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("evaldata", "eval_data"),
        ("eval_dataset", "eval_data"),
        ("evalData", "eval_data"),
        ("val_data", "eval_data"),
        ("finalize", "finalise"),
        ("finalse", "finalise"),
        ("metric", "metrics"),
        ("collate_fn", "collate"),
        ("colate", "collate"),
        ("genrate", "generate"),
    ],
)
def test_a_misspelling_is_refused_with_the_hook_that_was_meant(task_of: Any, name: str, meant: str) -> None:
    with pytest.raises(TaskError, match=rf"{name}\(\) is never called; did you mean {meant}\(\)\?"):
        check_methods(task_of(f"def {name}(self, *args): return None"))


@pytest.mark.parametrize("name", ["train_dataset", "training_data", "build_models", "los"])
def test_so_is_one_for_a_hook_that_must_be_there(task_of: Any, name: str) -> None:
    task_of("pass")
    module = sys.modules["methodical"]
    bare = type("Bare", (module.Task,), {"__module__": "methodical", name: Task.eval_data})
    with pytest.raises(TaskError, match="did you mean"):
        check_methods(bare())


@pytest.mark.parametrize(
    "line",
    [
        "def eval_data_path(self): return None",
        "def loss_fn(self, x): return x",
        "def losses(self): return None",
        "def load_data(self): return None",
        "def build_vocab(self): return None",
        "def make_model(self): return None",
        "def test_data(self): return None",
        "def _evaldata(self): return None",
        "finalize = 3",
        "@property\n    def evaldata(self): return None",
        "class Metric: pass",
        "def finalize(self, x): return x\n    def finalise(self, statistics): return {}",  # beside the hook
        "def evaldata(self): return None\n    def eval_data(self): return self.evaldata()",
        "def metric(self): return 1\n    def size(self): return self.metric()",  # called
        "def metric(self): return 1\n    def size(self): return getattr(self, 'metric')()",
    ],
)
def test_a_helper_is_not_accused(task_of: Any, line: str) -> None:
    ignored, _ = check_methods(task_of(line))
    assert ignored == []


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("configure_optimizers", "train.optimizer"),
        ("training_step", "loss()"),
        ("validation_step", "metrics()"),
        ("train_dataloader", "train_data()"),
        ("compute_loss", "loss()"),
        ("compute_metrics", "finalise()"),
        ("forward", "build_model()"),
    ],
)
def test_a_hook_of_another_framework_is_a_warning_that_says_what_to_use(task_of: Any, name: str, instead: str) -> None:
    (warning,), _ = check_methods(task_of(f"def {name}(self, *args): return None"))
    assert f"Mine.{name}() is never called" in warning
    assert instead in warning


def test_a_method_of_another_base_is_not_accused(task_of: Any) -> None:
    class Meter:
        def metric(self) -> int:
            return 0

    task_of("pass")
    module = sys.modules["methodical"]
    kind = type("Metered", (module.Base, Meter), {"__module__": "methodical", "metric": Meter.metric})
    assert check_methods(kind())[0] == []


def test_what_the_task_calls_itself_is_no_warning(task_of: Any) -> None:
    ignored, hooks = check_methods(task_of("def forward(self, x): return x", "def size(self): return self.forward(1)"))
    assert (ignored, hooks) == ([], "build_model, train_data, loss")


def test_both_stand_in_the_table(task_of: Any, make_spec: Any, tmp_path: Path) -> None:
    task_of("def configure_optimizers(self): return None")
    spec = make_spec("methodical:Mine")
    rows = [(c.ok, c.warning) for c in prepare(spec, tmp_path, "cpu").preflight.checks if c.name == "methods"]
    assert rows == [(True, False), (True, True)]

    task_of("def evaldata(self): return None")
    with pytest.raises(TaskError, match="did you mean eval_data") as caught:
        prepare(spec, tmp_path, "cpu")
    assert [c.name for c in checks_of(caught.value) if not c.ok] == ["methods"]
