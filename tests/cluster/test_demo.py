"""The demo as a user runs it, with a real cluster: interrupted, and after a run that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pscluster.settings import runtime_dir

REPOSITORY = Path(__file__).parents[2]


class Demo:
    """Demo processes of one state home; each process they start carries `mark` in its environment."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[str]] = []

    def start(self, steps: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "examples" / "demo.py"), "--output", str(self.home / "out")],
            env={
                **os.environ,
                "XDG_STATE_HOME": str(self.home),
                "DEMO_MARK": self.mark,
                "DEMO_SET": f"train.max_steps={steps} task.args.held_out_bytes=20000",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def running(self) -> list[psutil.Process]:
        """Every process of any of the demos, except the demos themselves."""
        own = {process.pid for process in self.started}
        return [process for process in psutil.process_iter() if process.pid not in own and self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("DEMO_MARK") == self.mark
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    for started in demo.started:
        if started.poll() is None:
            started.kill()
        started.communicate()
    for process in demo.running():
        process.kill()
    psutil.wait_procs(demo.running(), timeout=30)


def read_until(process: subprocess.Popen[str], beginning: str) -> None:
    """Block until the demo prints a line with this beginning."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return
    pytest.fail(f"the demo ended before {beginning!r}:\n{''.join(lines)}")


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing(demo: Demo, tmp_path: Path) -> None:
    process = demo.start(steps=5000)
    read_until(process, "step ")

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)

    assert process.returncode == 130
    assert demo.running() == []
    assert not runtime_dir(tmp_path / "pscluster-demo" / "cluster").exists()


@pytest.mark.slow
def test_the_demo_works_after_one_that_was_killed(demo: Demo, tmp_path: Path) -> None:
    killed = demo.start(steps=5000)
    read_until(killed, "step ")
    killed.kill()
    killed.wait()
    assert demo.running()  # its cluster still runs, with an unfinished job

    process = demo.start(steps=6)
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 0, output
    for shown in ("byte bigram", "byte trigram", "this model", "after 6 steps", "$ psctl generate"):
        assert shown in output
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert demo.running() == []
    assert not runtime_dir(tmp_path / "pscluster-demo" / "cluster").exists()
    assert not (tmp_path / "pscluster-demo" / "cluster").exists()
