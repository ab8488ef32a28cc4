"""Step time of a 12 M-parameter GPT: 2 workers x 2 partitions over DDP, 1 x 1 over a plain loop, on two cores.

    python benchmarks/step_time.py [--rounds 3] [--steps 24]

The baselines are as good as we can make them: DDP over gloo with gradient_as_bucket_view and fused AdamW; a plain loop
with fused AdamW. Same model, sequences, clipping and one thread a process everywhere. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn

from _measure import cluster, interleaved, ratio, step_times, write
from psworker.tasks.synthetic import SyntheticLm

MODEL = {"layers": 6, "d_model": 384, "heads": 6, "context": 64, "vocabulary": 4096, "dropout": 0.0}
MICROBATCH = 4
SKIP = 6


def spec(workers: int, partitions: int, transport: str, steps: int) -> dict[str, object]:
    """One microbatch a worker and step; no snapshot and no evaluation inside the measured steps."""
    return {
        "name": "bench",
        "task": {
            "entrypoint": "psworker.tasks.synthetic:SyntheticLm",
            "args": MODEL | {"num_samples": 4096, "held_out": 0},
        },
        "train": {
            "global_batch": MICROBATCH * workers,
            "microbatch": MICROBATCH,
            "max_steps": steps,
            "clip_norm": 1.0,
            "optimizer": {"name": "adamw", "lr": 3e-4, "weight_decay": 0.1},
        },
        "workers": {"min": workers, "max": workers},
        "servers": {"partitions": partitions},
        "durability": {"every_steps": 100_000},
        "network": {"transport": transport},
    }


def ours(workers: int, partitions: int, transport: str, steps: int) -> dict[str, float]:
    with cluster(workers, partitions) as connected:
        return {"step_s": statistics.median(step_times(connected, spec(workers, partitions, transport, steps), SKIP))}


def baseline(world: int, steps: int) -> dict[str, float]:
    """DDP over `world` processes; one process is the plain loop."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(rank), "--world", str(world), "--steps", str(steps),
                 "--rendezvous", f"{directory}/store"],
                env=environment, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError("a baseline process failed")
    return {"step_s": float(outputs[0])}


def baseline_rank(rank: int, world: int, steps: int, rendezvous: str) -> None:
    """One process of the baseline; rank 0 prints the median step time in seconds."""
    torch.set_num_threads(1)
    task = SyntheticLm(**MODEL, num_samples=4096, held_out=0)  # type: ignore[arg-type]  # the spec's args
    torch.manual_seed(0)
    model: nn.Module = task.build_model()
    forward = model
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        forward = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    data = task.train_data()
    marks = []
    for step in range(steps):
        first = (step * world + rank) * MICROBATCH
        batch = task.collate([data[(first + i) % len(data)] for i in range(MICROBATCH)])
        loss_sum, weight = task.loss(forward, batch)
        (loss_sum / weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)
        marks.append(time.perf_counter())
    if rank == 0:
        print(statistics.median(b - a for a, b in zip(marks[SKIP:], marks[SKIP + 1 :], strict=False)))
    if world > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank >= 0:
        baseline_rank(options.rank, options.world, options.steps, options.rendezvous)
        return
    found = interleaved(
        {
            "ddp": lambda: baseline(2, options.steps),
            "unix": lambda: ours(2, 2, "unix", options.steps),
            "tcp": lambda: ours(2, 2, "tcp", options.steps),
            "plain": lambda: baseline(1, options.steps),
            "solo": lambda: ours(1, 1, "unix", options.steps),
        },
        options.rounds,
    )
    keys = {
        "unix_step_over_ddp": ratio(found, "unix", "ddp", "step_s"),
        "tcp_step_over_ddp": ratio(found, "tcp", "ddp", "step_s"),
        "solo_step_over_plain": ratio(found, "solo", "plain", "step_s"),
    }
    write("step_time", keys, found, "12 M-parameter GPT, sequence 64, microbatch 4, one thread a process")


if __name__ == "__main__":
    main()
