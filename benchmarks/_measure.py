"""What the benchmarks share: a cluster to measure on, interleaved rounds, and results with their circumstances."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pscluster.client import Cluster
from pscluster.settings import runtime_dir
from pscluster.spec import parse_spec

RESULTS = Path(__file__).parent / "results"
PSCTL = Path(sys.executable).parent / "psctl"
Samples = dict[str, list[float]]


def interleaved(sides: Mapping[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, Samples]:
    """Run every side once in each round, in turn; gives, by side and by what it measured, the samples in order."""
    found: dict[str, Samples] = {name: {} for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            for key, value in measure().items():
                found[name].setdefault(key, []).append(value)
            shown = ", ".join(f"{key} {values[-1]:.4g}" for key, values in found[name].items())
            print(f"round {number + 1}/{rounds}  {name:12} {shown}", flush=True)
    return found


def ratio(found: Mapping[str, Samples], ours: str, theirs: str, key: str) -> float:
    """Ratio of the medians."""
    return statistics.median(found[ours][key]) / statistics.median(found[theirs][key])


def write(name: str, keys: Mapping[str, float], found: Mapping[str, Samples], note: str) -> None:
    """Write benchmarks/results/<name>.json and print the keys."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
    }
    record = {"name": name, "note": note, "keys": dict(keys), "machine": machine, "samples": found}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for key, value in keys.items():
        print(f"{key} = {value:.3f}")


@contextmanager
def cluster(workers: int, servers: int) -> Iterator[Cluster]:
    """A local cluster of its own, taken down at the end."""
    with tempfile.TemporaryDirectory(prefix="psb-") as directory:
        state_dir = Path(directory)
        environment = os.environ | {"PS_STATE_DIR": directory}
        subprocess.run(
            [PSCTL, "up", "--workers", str(workers), "--servers", str(servers)],
            env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            token = (state_dir / "token").read_text().strip()
            yield Cluster.connect(address=f"unix:{runtime_dir(state_dir)}/master.sock", token=token)
        finally:
            subprocess.run([PSCTL, "down"], env=environment, check=True, stderr=subprocess.DEVNULL)


def step_times(connected: Cluster, spec: Mapping[str, Any], skip: int) -> list[float]:
    """Train a job to its end; seconds between its commits, without the first `skip` steps."""
    job = connected.submit(parse_spec(spec))
    connected.wait(job, "succeeded", timeout_s=600)
    times = [line["time_s"] for line in connected.metrics(job) if "time_s" in line]
    return [later - earlier for earlier, later in zip(times[skip:], times[skip + 1 :], strict=False)]
