"""A partition without progress makes its trainers wait; no process's memory grows meanwhile."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.jobs import even_split, lm_spec
from harness.plain import train_plainly
from harness.static_job import StaticJob

STOPPED_S = 5.0
SHARDS = 8
# The model's gradients are 9 MB. What a trainer owes is at most the two nodes of its run, what a partition holds as
# much of each trainer; the rest is room for malloc.
MOST_GROWTH_BYTES = 48 << 20


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_stopped_partition_slows_its_trainers_and_costs_no_memory(transport: str, tmp_path: Path) -> None:
    spec = lm_spec(partitions=2, transport=transport, steps=40)
    spec["train"] |= {"global_batch": 2 * SHARDS}
    spec["evaluate"] = {}
    spec["durability"] = {"every_steps": 1000}
    with StaticJob(spec, 2, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(SHARDS, 2))
        job.wait_step(3)
        before = {name: resident(child.process.pid) for name, child in job.children.items()}
        victim = psutil.Process(job.children["partition-1"].process.pid)
        victim.send_signal(signal.SIGSTOP)
        step, peaks = job.step, dict(before)
        for _ in watched(STOPPED_S):
            assert victim.status() == psutil.STATUS_STOPPED
            for name, child in job.children.items():
                peaks[name] = max(peaks[name], resident(child.process.pid))
        victim.send_signal(signal.SIGCONT)
        job.wait_finished()
        assert step < job.step == 40
    grown = {name: peaks[name] - before[name] for name in peaks}
    assert max(grown.values()) < MOST_GROWTH_BYTES, grown
    assert job.reported("partition-0", "finished")[-1].parameters_sha256 == train_plainly(spec).digest


def watched(duration_s: float) -> Iterator[None]:
    """Instants over `duration_s`: how long the stop lasts is what the test is about."""
    deadline, tick = time.monotonic() + duration_s, threading.Event()
    while time.monotonic() < deadline:
        tick.wait(0.1)
        yield


def resident(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)
