"""A local cluster as `psctl up` makes it, and the job that is measured in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from _jobs import SKIP
from _marks import median_step_s
from _watch import CpuSeries
from pscluster.client import Cluster, Job
from pscluster.job.bundle import Bundle
from pscluster.job.spec import parse_spec
from pscluster.settings import runtime_dir

PSCTL = Path(sys.executable).parent / "psctl"
DEADLINE_S = 600


def trained(spec: Mapping[str, Any], bundle: Bundle | None = None) -> dict[str, float]:
    """Train a job to its end in a cluster of its own: median seconds between commits, CPU seconds a sample.

    CPU seconds are those of all trainers and partitions over the measured steps; agents and master apart, as
    `daemons_cpu_s_per_sample`."""
    workers, partitions = spec["workers"]["max"], spec["servers"]["partitions"]
    with _cluster(workers, partitions) as (connected, daemons):
        children = CpuSeries(lambda: [kid for daemon in daemons for kid in daemon.children()], workers + partitions)
        around = CpuSeries(lambda: daemons, len(daemons))
        with children.watch(), around.watch():
            job = connected.submit(parse_spec(spec), bundle)
            connected.wait(job, "succeeded", timeout_s=DEADLINE_S)
        times = [line["time_s"] for line in connected.metrics(job) if "time_s" in line][SKIP:]
    samples = (len(times) - 1) * spec["train"]["global_batch"]
    return {
        "step_s": median_step_s(times),
        "cpu_s_per_sample": children.between(times[0], times[-1]) / samples,
        "daemons_cpu_s_per_sample": around.between(times[0], times[-1]) / samples,
    }


def committed(spec: Mapping[str, Any]) -> tuple[dict[int, float], Job]:
    """Train a job to its end in a cluster of its own: the Unix time of each step's commit, and the job as it ended.

    There are as many servers as partitions."""
    with _cluster(spec["workers"]["max"], spec["servers"]["partitions"]) as (connected, _):
        job = connected.submit(parse_spec(spec))
        ended = connected.wait(job, "succeeded", timeout_s=DEADLINE_S)
        lines = [line for line in connected.metrics(job) if "time_s" in line]
        return {line["step"]: line["time_s"] for line in lines}, ended


@contextmanager
def _cluster(workers: int, servers: int) -> Iterator[tuple[Cluster, list[psutil.Process]]]:
    """A client of it, and its daemons; taken down at the end."""
    with tempfile.TemporaryDirectory(prefix="psb-") as directory:
        state_dir = Path(directory)
        environment = os.environ | {"PS_STATE_DIR": directory}
        command = [str(PSCTL), "up", "--workers", str(workers), "--servers", str(servers)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            token = (state_dir / "token").read_text().strip()
            record = json.loads((state_dir / "cluster.json").read_text())
            daemons = [psutil.Process(daemon["pid"]) for daemon in record["daemons"]]
            yield Cluster.connect(address=f"unix:{runtime_dir(state_dir)}/master.sock", token=token), daemons
        finally:
            subprocess.run([PSCTL, "down"], env=environment, check=True, stderr=subprocess.DEVNULL)
