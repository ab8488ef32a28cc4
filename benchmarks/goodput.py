"""Goodput of a 12 M-parameter model's push and pull, without any forward or backward: bytes moved / seconds.

    python benchmarks/goodput.py [--rounds 3] [--steps 120] [--only tcp raw_tcp ...]

Each step pushes the gradients of every bucket, last bucket first, and receives all values of the next version. A driver
(_driver.py) replaces the trainer, with the trainer's own exchange; partitions are the product's. Without optimizer a
partition still gates, sums, votes and sends the values. A ratio above 1 means that the product is faster. Needs an
otherwise idle machine and takes about three minutes.

    goodput_over_raw_tcp        1 x 1 over TCP, no optimizer / one raw TCP connection that carries the same bytes, there
                                and back in turn, with the same checksums
    goodput_adamw_over_raw_tcp  the same with AdamW / the same raw connection without one
    goodput_over_grpc           2 x 2 over TCP with AdamW / gRPC streams of the same bytes, 2 clients x 2 servers
    cpu_s_per_gb                1 x 1 over TCP, no optimizer: CPU seconds of both processes per 1e9 bytes moved

Also recorded: the same over Unix sockets and shared memory, and the raw connection's CPU seconds.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import psutil

from _grpc_stream import grpc_stream
from _jobs import spec, task
from _marks import median_step_s
from _measure import Key, Side, options, run
from _raw_tcp import raw_tcp
from _static import Starter, fill, started, train
from _watch import CpuSeries
from harness.static_job import StaticJob
from pscluster.job.spec import parse_spec
from pscluster.step.layout import Layout
from psworker.replica import layout_of

NAME = "goodput"
SKIP = 10
DRIVER = Path(__file__).parent / "_driver.py"
KEYS = {
    "goodput_over_raw_tcp": Key(what="bytes_per_s", of=("tcp",), over=("raw_tcp",), best="highest"),
    "goodput_adamw_over_raw_tcp": Key(what="bytes_per_s", of=("tcp_adamw",), over=("raw_tcp",), best="highest"),
    "goodput_over_grpc": Key(what="bytes_per_s", of=("tcp_adamw_2x2",), over=("grpc_2x2",), best="highest"),
    "cpu_s_per_gb": Key(what="cpu_s_per_gb", of=("tcp",)),
}


def ours(steps: int, transport: str, *, pairs: int = 1, adamw: bool = False) -> dict[str, float]:
    """`pairs` drivers and as many partitions: bytes a second of all, CPU seconds a GB of all."""
    starter = Starter(trainer=(str(DRIVER), *(["--touch"] if adamw else [])))
    job_spec = spec(workers=pairs, partitions=pairs, steps=steps, transport=transport)
    with started(job_spec, starter) as (job, pids):
        series = CpuSeries(partial(map, psutil.Process, pids.values()), len(pids))
        fill(job)
        with series.watch():
            times = train(job, SKIP)
        if transport != "shm":
            wait_counted(job, pairs * steps * num_bytes())
    moved = pairs * 2 * num_bytes()
    step_s = median_step_s(times)
    cpu_s = series.between(times[0], times[-1])
    return {"bytes_per_s": moved / step_s, "cpu_s_per_gb": cpu_s / (moved * (len(times) - 1) / 1e9)}


def wait_counted(job: StaticJob, size_bytes: int) -> None:
    """Block until the partitions have reported that at least so much came in, and went out; fails if they never do.

    Without this a push or pull that is left out by mistake would look like speed."""
    for counter in ("push_bytes_total", "pull_bytes_total"):
        job.wait(lambda c=counter: _counted(job, c) >= size_bytes, counter)  # type: ignore[misc]


def _counted(job: StaticJob, counter: str) -> float:
    """The sum of one counter over the partitions."""
    found = (item for child in job.children.values() for item in child.counters.items())
    return sum(value for label, value in found if label.startswith(counter + "{"))


def num_bytes() -> int:
    """What one trainer pushes in a step, and what it takes."""
    optimizer = parse_spec(spec(workers=1, partitions=1, steps=1, transport="auto")).train.optimizer
    layout: Layout = layout_of(task().build_model(), optimizer)
    return sum(4 * bucket.num_words for bucket in layout.buckets if bucket.kind == "trained")


def sides(steps: int) -> dict[str, Side]:
    """Everything that is measured, in the order of a round."""
    size = num_bytes()
    return {
        "raw_tcp": partial(raw_tcp, size, steps, SKIP),
        "tcp": partial(ours, steps, "tcp"),
        "tcp_adamw": partial(ours, steps, "tcp", adamw=True),
        "unix": partial(ours, steps, "unix"),
        "shm": partial(ours, steps, "shm"),
        "grpc_2x2": partial(grpc_stream, size, steps, SKIP, clients=2, servers=2),
        "tcp_adamw_2x2": partial(ours, steps, "tcp", pairs=2, adamw=True),
    }


def main() -> None:
    chosen = options(__doc__ or "", rounds=3, steps=120).parse_args()
    note = f"push and pull of {num_bytes()} bytes a trainer each way, one thread a process"
    run(NAME, sides(max(chosen.steps, SKIP + 2)), KEYS, note, chosen)


if __name__ == "__main__":
    main()
