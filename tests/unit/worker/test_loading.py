"""From an entry point to a task, or to an error that carries the user's own traceback."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pscluster.errors import DataError, LayoutError, OutOfMemoryError, TaskError
from pscluster.task import Task
from pscluster.user_frames import frame_details
from psworker.tasks.synthetic import SyntheticLm
from psworker.trainer.data.loading import build_model, load_data, load_task, user_code
from psworker.trainer.exchange import SupersededError


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def bundle(tmp_path: Path, source: str, name: str = "mine.py") -> Path:
    (tmp_path / name).write_text(source)
    return tmp_path


def test_a_built_in_task_gets_its_args_uri_and_seed(make_spec: Any) -> None:
    spec = make_spec(args={"d_model": 16}, data={"uri": "somewhere"}, train={"seed": 9})

    task = load_task(spec, None)

    assert isinstance(task, SyntheticLm)
    assert (task.d_model, task.data_uri, task.seed) == (16, "somewhere", 9)


def test_a_bundles_module_comes_before_an_installed_one_of_the_same_name(make_spec: Any, tmp_path: Path) -> None:
    source = "from pscluster.task import Task\nclass Mine(Task): pass\n"

    task = load_task(make_spec("ngram:Mine"), bundle(tmp_path, source, "ngram.py"))

    assert sys.modules[type(task).__module__].__file__ == str(tmp_path / "ngram.py")


@pytest.mark.parametrize(
    ("entrypoint", "source", "expected"),
    [
        ("mime:Mine", "", "no module 'mime' in the submitted directory .*did you mean mine"),
        ("mine:Mina", "class Mine(Task): pass", "mine has no Mina; did you mean Mine"),
        ("mine:Other", "class Mine(Task): pass", "mine has no Other; its tasks: Mine"),
        ("mine:torch", "import torch\nclass Mine(Task): pass", "mine:torch is not a subclass .*; its tasks: Mine"),
        ("mine:Task", "class Mine(Task): pass", "mine:Task is not a subclass .*; its tasks: Mine"),
        ("mine:Mine", "class Mine: pass", "not a subclass of pscluster.task.Task"),
        ("mine:Mine", "import nowhere_to_be_found", "importing mine raised ModuleNotFoundError"),
        ("mine:Mine", "def broken(:", "importing mine raised SyntaxError"),
        ("mine:Mine", "raise SystemExit(3)", "importing mine raised SystemExit: 3"),
    ],
)
def test_what_cannot_be_imported_is_named(
    make_spec: Any, tmp_path: Path, entrypoint: str, source: str, expected: str
) -> None:
    directory = bundle(tmp_path, f"from pscluster.task import Task\n{source}\n")

    with pytest.raises(TaskError, match=expected):
        load_task(make_spec(entrypoint), directory)


def test_a_misspelt_built_in_task_is_named_with_the_nearest(make_spec: Any) -> None:
    with pytest.raises(TaskError, match=r"no module .* did you mean psworker\.tasks\.byte_lm\?"):
        load_task(make_spec("psworker.tasks.byt_lm:ByteLm"), None)


def test_the_traceback_is_the_users_alone(make_spec: Any, tmp_path: Path) -> None:
    source = "from pscluster.task import Task\ndef boom():\n    return 1 / 0\nboom()\n"

    with pytest.raises(TaskError) as caught:
        load_task(make_spec("mine:Mine"), bundle(tmp_path, source))

    lines = caught.value.details["traceback"].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{tmp_path}/mine.py", line 4, in <module>'
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert not any("importlib" in line or "loading.py" in line for line in lines)


@pytest.mark.parametrize(
    ("source", "args"), [("def broken(:", {}), ("class Mine(Task):\n    def __init__(self, n): pass", {})]
)
def test_a_traceback_without_frames_of_the_users_has_none_of_ours(
    make_spec: Any, tmp_path: Path, source: str, args: dict[str, Any]
) -> None:
    directory = bundle(tmp_path, f"from pscluster.task import Task\n{source}\n")

    with pytest.raises(TaskError) as caught:
        load_task(make_spec("mine:Mine", args), directory)

    assert "Error: " in caught.value.details["traceback"]
    assert not any(part in caught.value.details["traceback"] for part in ("loading.py", "importlib"))


def test_a_misspelt_argument_is_named_with_the_nearest(make_spec: Any) -> None:
    with pytest.raises(TaskError, match="SyntheticLm takes no 'd_modle'; did you mean d_model"):
        load_task(make_spec(args={"d_modle": 3}), None)


def test_a_constructor_that_raises_is_the_users_error(make_spec: Any, tmp_path: Path) -> None:
    source = (
        "from pscluster.task import Task\n"
        "class Mine(Task):\n"
        "    def __init__(self, n): raise ValueError(f'{n} is too small')\n"
    )

    with pytest.raises(TaskError, match=r"Mine\(\.\.\.\) raised ValueError: 3 is too small") as caught:
        load_task(make_spec("mine:Mine", {"n": 3}), bundle(tmp_path, source))

    assert "in __init__" in caught.value.details["traceback"]


class _Broken(Task):
    def __init__(self, train: object, held_out: object = None) -> None:
        self.train = train
        self.held_out = held_out

    def build_model(self) -> object:  # type: ignore[override]
        return "no module"

    def train_data(self) -> object:  # type: ignore[override]
        if isinstance(self.train, Exception):
            raise self.train
        return self.train

    def eval_data(self) -> object:  # type: ignore[override]
        return self.held_out


@pytest.mark.parametrize(
    ("task", "kind", "expected"),
    [
        (_Broken(FileNotFoundError(2, "No such file", "/data/x")), DataError, "train_data raised .*'/data/x'"),
        (_Broken(ValueError("odd")), TaskError, "train_data raised ValueError: odd"),
        (_Broken([]), DataError, r"train_data\(\) has no samples"),
        (_Broken([1], []), DataError, r"eval_data\(\) has no samples"),
        (_Broken(iter([1])), TaskError, "not a map-style data set"),
    ],
)
def test_missing_or_odd_data_are_named(task: Task, kind: type[TaskError], expected: str) -> None:
    with pytest.raises(kind, match=expected) as caught:
        load_data(task)

    assert type(caught.value) is kind


def test_a_model_that_is_none_is_named() -> None:
    with pytest.raises(TaskError, match=r"build_model\(\) returned str"):
        build_model(_Broken([1]))


def test_the_same_seed_builds_the_same_model(make_spec: Any) -> None:
    task = load_task(make_spec(), None)

    first, second = (build_model(task).state_dict() for _ in range(2))
    task.seed += 1
    third = build_model(task).state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["tokens.weight"], third["tokens.weight"])


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("3")])
def test_whatever_user_code_raises_is_a_task_error(error: BaseException) -> None:
    with pytest.raises(TaskError, match=f"loss raised {type(error).__name__}") as caught, user_code("loss"):
        raise error

    assert caught.value.__cause__ is error


def test_what_a_hook_raises_in_backward_is_a_task_error_too() -> None:
    doubled = torch.ones(1, requires_grad=True) * 2
    doubled.register_hook(lambda _: sys.exit(3))

    with pytest.raises(TaskError, match="backward raised SystemExit: 3") as caught, user_code("backward"):
        doubled.sum().backward()  # type: ignore[no-untyped-call]

    assert frame_details(caught.value.details["traceback"])["file"] == __file__


@pytest.mark.parametrize("error", [LayoutError("x"), GeneratorExit()])
def test_errors_that_are_not_the_users_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, user_code("loss"):
        raise error

    assert caught.value is error


def test_a_step_that_is_no_longer_wanted_passes_through_user_code() -> None:
    """It is raised within the user's forward, where an operation waits for its parameters: no fault of the task, and
    not to be swallowed there."""

    def careful_forward() -> None:
        try:
            raise SupersededError("step 5 is no longer wanted")
        except Exception:
            pytest.fail("user code caught it")

    with pytest.raises(SupersededError), user_code("loss"):
        careful_forward()


@pytest.mark.parametrize("take", [lambda: bytearray(1 << 62), lambda: torch.empty(1 << 60)])
def test_want_of_memory_is_named_as_such(take: Any) -> None:
    with pytest.raises(OutOfMemoryError, match="loss ran out of memory"), user_code("loss"):
        take()


DRAWING = """
import random
import numpy as np
import torch
from torch.utils.data import random_split
from pscluster.task import Task

def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(1))

AT_IMPORT = draw()

class Mine(Task):
    def __init__(self): self.draws = [AT_IMPORT, draw()]
    def build_model(self):
        self.draws.append(draw())
        return torch.nn.Linear(1, 1)
    def _split(self): return random_split(range(100), [80, 20])
    def train_data(self): return self._split()[0]
    def eval_data(self): return self._split()[1]
"""


def test_random_draws_while_loading_are_the_same_in_every_process(
    make_spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And data that are divided at random for training and evaluation have no sample in common."""
    (tmp_path / "drawing.py").write_text(DRAWING)
    seen = []
    for noise in range(2):
        monkeypatch.delitem(sys.modules, "drawing", raising=False)
        random.seed(noise)
        np.random.seed(noise)
        torch.manual_seed(noise)
        task: Any = load_task(make_spec("drawing:Mine"), tmp_path)
        build_model(task)
        train, held_out = (list(data) for data in load_data(task) if data)  # type: ignore[call-overload]
        assert sorted([*train, *held_out]) == list(range(100))
        seen.append((task.draws, train, held_out))
    assert seen[0] == seen[1]
