"""Threads, descriptors and memory of every process are the same after two thousand steps as after two hundred."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from harness.cluster import LocalCluster, local_cluster
from harness.jobs import lm_spec

MIB = 1 << 20
RSS_SLACK_BYTES = 6 * MIB  # allocator arenas settle; a leak of 4 KiB a step would show as 7 MiB
# asyncio.to_thread adds threads to its pool when none is idle, up to this many; a thread leaked with every snapshot or
# evaluation would be 36 or 18 more.
POOL_THREADS = (os.cpu_count() or 1) + 4
SETTLED, LATE = 200, 2000


def everyone(cluster: LocalCluster) -> dict[str, psutil.Process]:
    """Every daemon and its processes, by name."""
    found = {name: cluster.daemon(name) for name in ("master", "worker-0", "worker-1", "server-0")}
    for name in ("worker-0", "worker-1", "server-0"):
        for number, process in enumerate(sorted(cluster.daemon(name).children(), key=lambda p: p.pid)):
            found[f"{name}/{number}"] = process
    return found


@pytest.mark.slow
def test_two_thousand_steps_are_flat(tmp_path: Path) -> None:
    spec = lm_spec(partitions=2, steps=LATE + 100, layers=1, d_model=16, heads=2, context=8, vocabulary=32)
    spec["train"] |= {"global_batch": 4, "microbatch": 1}
    spec |= {"workers": {"min": 2, "max": 2}, "durability": {"every_steps": 50}, "evaluate": {"every_steps": 100}}
    with local_cluster(tmp_path, workers=2, servers=1) as cluster:
        job = cluster.submit(spec, tmp_path)
        cluster.wait(job, f"step={SETTLED}")
        processes = everyone(cluster)
        assert len(processes) == 8
        before = {name: (p.num_threads(), p.num_fds(), p.memory_info().rss) for name, p in processes.items()}
        cluster.wait(job, f"step={LATE}")
        after = {name: (p.num_threads(), p.num_fds(), p.memory_info().rss) for name, p in processes.items()}
        cluster.wait(job, "succeeded")
        store = Path(cluster.describe(job)["store"])
        parts, others = list(store.glob("*.snapshot")), [path for path in store.iterdir() if path.suffix != ".snapshot"]
    for name, (threads, descriptors, rss) in before.items():
        assert after[name][0] <= threads + POOL_THREADS, f"{name}: {threads} threads, then {after[name][0]}"
        assert after[name][1] <= descriptors + 2, f"{name}: {descriptors} descriptors, then {after[name][1]}"
        grown = after[name][2] - rss
        assert grown <= RSS_SLACK_BYTES, f"{name} grew by {grown / MIB:.1f} MiB"
    assert len(parts) <= 2 * 4  # the two newest, the best, and one on its way, of two partitions
    assert len(others) <= 4, others  # their manifests
