"""The user's own frames of a traceback and of the stack at a fatal signal, and the place that they name."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from pscluster.agent.position import user_frames_of
from pscluster.user_frames import Frame, frame_details, is_users, traceback_of, user_traceback
from psworker.trainer.data import loading

RAISED = """Traceback (most recent call last):
  File "task.py", line 30, in batches
    item = self[7]
KeyError: 7

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "task.py", line 16, in loss
    return shrink(model(batch))
           ^^^^^^^^^^^^^^^^^^^^
  File "parts/shrinking.py", line 4, in shrink
    return nn.functional.relu(x)
ValueError: no such colour
"""


@pytest.mark.parametrize(
    ("text", "details"),
    [
        (RAISED, {"file": "parts/shrinking.py", "line": "4", "function": "shrink"}),
        ('  File "a.py", line 1, in <module>\n  File "typo.py", line 3\n    def (\n', {"file": "typo.py", "line": "3"}),
        ("ImportError: not there", {}),
        ("", {}),
    ],
)
def test_the_place_of_an_error_is_its_last_frame(text: str, details: dict[str, str]) -> None:
    assert frame_details(text) == details


def users(directory: Path, source: str) -> BaseException:
    """What a function of the user's raises that is called from here."""
    file = directory / "mine.py"
    file.write_text(source)
    space: dict[str, object] = {}
    exec(compile(source, str(file), "exec"), space)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - of any kind
        space["run"]()  # type: ignore[operator]
    return caught.value


def test_a_traceback_has_the_users_frames_alone(tmp_path: Path) -> None:
    source = """import json
def run():
    try:
        json.loads('{')
    except ValueError as e:
        raise KeyError(1) from e
"""
    lines = user_traceback(users(tmp_path, source)).splitlines()
    named = [line.split('"')[1] for line in lines if line.startswith("  File ") and "mine.py" in line]
    assert named == [f"{tmp_path}/mine.py"] * 2  # of the cause and of the error
    assert not any("json/" in line for line in lines)
    assert lines[-1] == "KeyError: 1"
    assert frame_details("\n".join(lines))["line"] == "6"


def test_ours_and_what_is_installed_are_not_the_users() -> None:
    import torch

    import psworker.tasks.gpt

    assert [is_users(str(module.__file__)) for module in (torch, pytest, loading, psworker.tasks.gpt)] == [
        False,
        False,
        False,
        True,
    ]
    assert not is_users("<string>")
    assert is_users("/var/lib/psworker/jobs/p1/task.py"), "a state directory may have any name"


STACK = """Fatal Python error: Segmentation fault

Thread 0x00007f0000000001 (most recent call first):
  File "{code}/mine.py", line 90 in elsewhere

Current thread 0x00007f0000000002 (most recent call first):
  File "{stdlib}/ctypes/__init__.py", line 519 in string_at
  File "{code}/mine.py", line 3 in <lambda>
  File "{code}/mine.py", line 2 in loss
  File "{ours}", line 181 in _forward

Extension modules: numpy._core
"""


def test_the_stack_at_a_signal_is_that_of_its_thread_without_what_is_not_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("one\n  two\nthree\n")
    frames = user_frames_of(
        "Stack (most recent call first):\n"
        + STACK.format(code=tmp_path, stdlib=sysconfig.get_path("stdlib"), ours=loading.__file__),
        tmp_path,
    )
    assert frames == [Frame("mine.py", 2, "loss", "two"), Frame("mine.py", 3, "<lambda>", "three")]
    assert traceback_of(frames).splitlines()[1:3] == ['  File "mine.py", line 2, in loss', "    two"]
    assert user_frames_of("nothing of the kind", tmp_path) == []
