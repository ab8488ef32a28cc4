"""The measurement of one device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from psworker import compute_probe


def test_a_rate_is_of_the_median_run(monkeypatch: pytest.MonkeyPatch) -> None:
    taken_s = iter([9.0, 9.0, 1.0, 4.0, 2.0])  # two of them warm it up
    monkeypatch.setattr(compute_probe, "_multiply", lambda *_: next(taken_s))
    assert compute_probe.measure("cpu", 10, measure_s=0.0) == 2 * 10**3 / 2.0


def test_the_process_prints_one_line() -> None:
    command = [sys.executable, "-P", "-m", "pscluster.agent.launch", "psworker.compute_probe", "cpu", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    printed = json.loads(done.stdout)
    assert printed["flops_per_s"] > 0
    assert printed["threads"] == 1


def test_a_device_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        compute_probe.measure("cuda:99", 8)
