"""The benchmark of training on a device, run with a tiny model on the CPU, where its numbers have no meaning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_step.py"
TRAINER_PHASES = ("data", "pull", "forward", "backward", "push", "wait")


def check(device: str, directory: Path) -> None:
    """It runs, reports the time of each phase, and one and two trainers end with the same bits."""
    command = [sys.executable, str(SCRIPT), "--device", device, "--rounds", "1", "--steps", "6"]
    done = subprocess.run([*command, "--results", str(directory)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bits with one and two trainers: yes" in done.stdout
    result = json.loads((directory / "gpu_step.json").read_text())
    assert result["keys"]["gpu_tokens_over_plain"] > 0
    ours = result["samples"]["ours"]
    assert all(ours[f"trainer_{phase}_ms"] for phase in TRAINER_PHASES)
    assert ours["trainer_forward_ms"][0] > 0
    assert ours["partition_update_ms"][0] > 0


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    check("cpu", tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_runs_on_a_device(tmp_path: Path) -> None:
    check("cuda:0", tmp_path)
