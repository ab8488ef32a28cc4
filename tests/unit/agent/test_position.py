"""What a process notes outlives it: its place, the call of user code, the stack at a fatal signal and at os._exit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pscluster.agent.position import Position, last_position

PROGRAM = """
import ctypes, os, signal, sys, threading
from pathlib import Path
from pscluster.agent.position import position
position.keep_in(Path(sys.argv[1]))
if sys.argv[2] == "nothing":
    os.kill(os.getpid(), signal.SIGKILL)
position.begin("train", 12, 3)
def outer(then):
    with position.calling("loss"):
        with position.calling("collate"):
            pass
        then()
def fork():
    if os.fork() == 0:
        os._exit(5)
    os.wait()
    os.kill(os.getpid(), signal.SIGKILL)
def in_thread():
    thread = threading.Thread(target=lambda: os._exit(4))
    thread.start()
    thread.join()
ways = {"exit": lambda: os._exit(3), "thread": in_thread, "abort": os.abort, "null": lambda: ctypes.string_at(0),
        "fork": fork}
outer(ways[sys.argv[2]])
"""


def run(directory: Path, way: str) -> int:
    code = directory / "code"
    code.mkdir()
    (code / "mine.py").write_text(PROGRAM)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(code / "mine.py"), str(directory), way]
    return subprocess.run(command, env=environ, capture_output=True, check=False).returncode


@pytest.mark.parametrize(("way", "code"), [("exit", 3), ("thread", 4), ("abort", -6), ("null", -11)])
def test_place_call_and_stack_outlive_the_process(tmp_path: Path, way: str, code: int) -> None:
    assert run(tmp_path, way) == code
    found = last_position(tmp_path, tmp_path / "code")
    assert found is not None
    assert (found.activity, found.version, found.shard, found.call) == ("train", 12, 3, "loss")
    assert 'File "mine.py", line' in found.traceback
    line = {"exit": "ways = ", "thread": "thread = ", "null": "ways = ", "abort": "        then()"}[way]
    frames = [text for text in found.traceback.splitlines() if text.startswith("    ")]
    assert frames[-1].strip().startswith(line.strip())


def test_the_exit_of_a_forked_process_is_not_that_of_the_trainer(tmp_path: Path) -> None:
    assert run(tmp_path, "fork") == -9
    found = last_position(tmp_path, tmp_path / "code")
    assert found is not None
    assert found.traceback == ""


def test_a_process_that_had_no_user_code_yet_was_nowhere(tmp_path: Path) -> None:
    assert last_position(tmp_path, tmp_path) is None
    assert run(tmp_path, "nothing") == -9
    assert last_position(tmp_path, tmp_path / "code") is None


def test_the_step_is_the_one_that_is_made() -> None:
    here = Position()
    assert here.step == 0
    here.begin("train", 12, 0)
    assert here.step == 13
    here.begin("evaluate", 20, 0)
    assert here.step == 20


def test_a_call_ends_with_its_block_whatever_it_raises() -> None:
    here = Position()
    with pytest.raises(KeyError), here.calling("a name that is longer than what fits into the record of a position"):
        raise KeyError
    assert here._call == ""
