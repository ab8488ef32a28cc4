"""Memory of partitions and trainers, in bytes a parameter: 2 x 2 with AdamW in fp32, over shared memory and over TCP.

    python benchmarks/memory.py [--rounds 3] [--steps 8] [--only shm tcp ...]

A GPT of 80 M parameters with contexts of 8 tokens and one sample a microbatch: parameters dominate. Needs 6 GB and
takes about five minutes.

For each process it counts Pss_Anon + Pss_Shmem of /proc/PID/smaps_rollup: everything it allocated, and its part of
shared pages: a page that two processes map counts half for each, so that all together count it once. Pages of files
(programs, libraries) are left out: they exist once however many jobs run. A peak is the highest of all samples, some
tens a second, from the first step to the last commit, without the snapshots before and after.

    server_bytes_per_param             over shared memory: (peak of a partition - the same process when it is ready and
                                       has no plan yet) / parameters that it holds
    server_bytes_per_param_tcp         the same over TCP
    trainer_extra_bytes_per_param      over shared memory: (peak of a trainer - peak of a process that loops over the
                                       same forward and backward without an optimizer) / parameters of the model
    trainer_extra_bytes_per_param_tcp  the same over TCP

Means over the two partitions or trainers. The plain loop runs with defaults and with our trainers' malloc settings
(`plain_malloc`), and the smaller of the two counts. Also recorded: the partitions' peak with the snapshots, which copy.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

from _baseline import DEADLINE_S, Loop
from _baseline import started as baseline_started
from _jobs import MALLOC, SKIP, spec, task
from _measure import Key, Side, options, run
from _static import Starter, fill, started, train
from _watch import MemorySeries, memory_of

NAME = "memory"
GPT_80M = {"layers": 6, "d_model": 1024, "heads": 8, "context": 8, "vocabulary": 4096, "dropout": 0.0}
MICROBATCH = 1
PLAIN = ("plain", "plain_malloc")
KEYS = {
    "server_bytes_per_param": Key(what="server_bytes_per_param", of=("shm",)),
    "server_bytes_per_param_tcp": Key(what="server_bytes_per_param", of=("tcp",)),
    "trainer_extra_bytes_per_param": Key(what="trainer_bytes_per_param", of=("shm",), over=PLAIN, how="difference"),
    "trainer_extra_bytes_per_param_tcp": Key(what="trainer_bytes_per_param", of=("tcp",), over=PLAIN, how="difference"),
}


def ours(steps: int, transport: str) -> dict[str, float]:
    """Peaks of a job's processes, a parameter."""
    job_spec = spec(workers=2, partitions=2, steps=steps, transport=transport, model=GPT_80M, microbatch=MICROBATCH)
    with started(job_spec, Starter()) as (job, pids):
        servers = [pid for name, pid in pids.items() if name.startswith("partition")]
        trainers = [pid for name, pid in pids.items() if name.startswith("trainer")]
        idle = sum(memory_of(pid).total for pid in servers)
        series = MemorySeries(pids.values())
        with series.watch():
            fill(job)
            begun_s = time.time()
            committed_s = train(job, 0)[-1]
    steady = {pid: series.peak(pid, begun_s, committed_s) for pid in pids.values()}
    parameters = num_parameters()
    return {
        "server_bytes_per_param": (sum(steady[pid] for pid in servers) - idle) / parameters,
        "trainer_bytes_per_param": statistics.mean(steady[pid] for pid in trainers) / parameters,
        "server_bytes_per_param_with_snapshots": (sum(map(series.peak, servers)) - idle) / parameters,
    }


def plain(steps: int, malloc: bool) -> dict[str, float]:
    """Peak of one process that computes the same and updates nothing, a parameter."""
    loop = Loop(world=1, steps=steps, updates=False, model=GPT_80M, microbatch=MICROBATCH)
    with baseline_started(loop, MALLOC if malloc else {}) as (process,):
        series = MemorySeries([process.pid])
        with series.watch():
            process.communicate(timeout=DEADLINE_S)
    if process.returncode:
        raise RuntimeError(f"the plain loop failed: {process.returncode}")
    return {"trainer_bytes_per_param": series.peak(process.pid) / num_parameters()}


def num_parameters() -> int:
    """Of the model."""
    return sum(parameter.numel() for parameter in task(GPT_80M).build_model().parameters())


def sides(steps: int) -> dict[str, Side]:
    """Everything that is measured, in the order of a round."""
    return {
        "plain": partial(plain, steps, False),
        "plain_malloc": partial(plain, steps, True),
        "shm": partial(ours, steps, "shm"),
        "tcp": partial(ours, steps, "tcp"),
    }


def main() -> None:
    chosen = options(__doc__ or "", rounds=3, steps=8).parse_args()
    note = "GPT of 80 M parameters, context 8, microbatch 1, AdamW in fp32, 2 workers x 2 partitions"
    run(NAME, sides(max(chosen.steps, SKIP + 2)), KEYS, note, chosen)


if __name__ == "__main__":
    main()
