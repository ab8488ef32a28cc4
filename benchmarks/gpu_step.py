"""Training on a device: one trainer and its partitions over a plain loop with fused AdamW on the same device.

    python benchmarks/gpu_step.py [--rounds 3] [--steps 12] [--device auto] [--compile]

On a CUDA device it trains GPT-2 (124 M parameters, 1,024 tokens a sequence, 64 microbatches of 8: half a million
tokens a step) in bf16 autocast, with fp32 parameters; on a CPU it trains a tiny model, to show that it runs. Prints
tokens a second, the share of the device's peak arithmetic that they are (MFU, after Chowdhery et al. 2022, appendix B:
6 N + 12 l d t operations a token), and where the time of a step goes by the trainer's and partitions' own phase
counters. Then one and two trainers on the device train the same few steps, and must end with the same bits.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from _jobs import CLIP_NORM, ONE_THREAD, OPTIMIZER, spec, task
from _measure import Key, options, run
from _static import Starter, fill, started, train

GPT_2 = {"layers": 12, "d_model": 768, "heads": 12, "context": 1024, "vocabulary": 50257, "dropout": 0.0}
TINY = {"layers": 2, "d_model": 64, "heads": 2, "context": 32, "vocabulary": 256, "dropout": 0.0}
SKIP = 3
# Dense bf16 operations a second, from the makers' data sheets.
PEAK = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
KEYS = {"gpu_tokens_over_plain": Key(what="tokens_s", of=("ours",), over=("plain",), best="highest")}


class Shape:
    """What is trained on a device: model, microbatch, microbatches a step, partitions."""

    def __init__(self, device: str) -> None:
        on_gpu = device.startswith("cuda")
        self.device = device
        self.model: Mapping[str, Any] = GPT_2 if on_gpu else TINY
        self.microbatch, self.accumulate = (8, 64) if on_gpu else (4, 4)
        self.partitions = max(1, min(8, (os.cpu_count() or 1) - 2)) if on_gpu else 1

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.microbatch * self.accumulate * int(self.model["context"])

    def job(self, steps: int, workers: int = 1, *, compiled: bool = False) -> dict[str, Any]:
        """The same step whatever the number of workers."""
        made = spec(
            workers=workers, partitions=self.partitions, steps=steps, transport="auto", model=self.model,
            accumulate=self.accumulate // workers, microbatch=self.microbatch,
        )  # fmt: skip
        made["train"] |= {"autocast": "bf16", "compile": compiled}
        made["workers"]["device"] = self.device.partition(":")[0]
        return made


def ours(shape: Shape, steps: int, compiled: bool) -> dict[str, float]:
    """Tokens a second of a trainer and its partitions; phases in milliseconds a step."""
    with started(shape.job(steps, compiled=compiled), Starter(), device=shape.device) as (job, _):
        fill(job)
        times = train(job, SKIP)
        before = {name: child.counters for name, child in job.children.items()}
        job.wait(lambda: all(child.counters is not before[name] for name, child in job.children.items()), "counters")
        step_s = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
        return {"tokens_s": shape.tokens / step_s, "step_s": step_s} | phases(job.children.values(), steps)


def phases(children: Any, steps: int) -> dict[str, float]:
    """Milliseconds of a step in each phase, of the trainer and of one partition, over the whole run."""
    found: dict[str, list[float]] = {}
    for child in children:
        role = child.name.partition("-")[0]
        for series, seconds in child.counters.items():
            if series.startswith("phase_seconds_total"):
                labels = json.loads(series.removeprefix("phase_seconds_total"))
                found.setdefault(f"{role}_{labels['phase']}_ms", []).append(1000 * seconds / steps)
    return {name: statistics.mean(values) for name, values in found.items()}


def digest(shape: Shape, workers: int, steps: int) -> str:
    """parameters_sha256 after a few steps with so many trainers on the one device."""
    with started(shape.job(steps, workers), Starter(), device=shape.device) as (job, _):
        fill(job)
        train(job, 0)
        return str(job.reported("partition-0", "finished")[-1].parameters_sha256)


def plain(shape: Shape, steps: int, compiled: bool) -> dict[str, float]:
    """The loop everybody writes, in a process of its own."""
    words = [sys.executable, __file__, "--device", shape.device, "--steps", str(steps), "--plain"]
    words += ["--compile"] if compiled else []
    measured = subprocess.run(words, env=os.environ | ONE_THREAD, check=True, stdout=subprocess.PIPE, text=True).stdout
    step_s = float(measured.splitlines()[-1])
    return {"tokens_s": shape.tokens / step_s, "step_s": step_s}


def be_plain(shape: Shape, steps: int, compiled: bool) -> None:
    """Prints the median time of a step in seconds. Backward of each microbatch ends before the next one's data."""
    torch.set_num_threads(1)
    made = task(shape.model)
    torch.manual_seed(0)
    model = made.build_model().to(shape.device)
    if compiled:
        model.compile()  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)
    data, kind, marks = made.train_data(), shape.device.partition(":")[0], []
    for step in range(steps):
        for part in range(shape.accumulate):
            first = (step * shape.accumulate + part) * shape.microbatch
            batch = made.collate([data[(first + i) % len(data)] for i in range(shape.microbatch)]).to(shape.device)
            with torch.autocast(kind, dtype=torch.bfloat16):
                loss_sum, weight = made.loss(model, batch)
            (loss_sum / (weight * shape.accumulate)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss_sum.detach())  # the step has ended
        marks.append(time.perf_counter())
    print(statistics.median(later - earlier for earlier, later in zip(marks[SKIP:], marks[SKIP + 1 :], strict=False)))


def utilization(shape: Shape, tokens_s: float) -> float | None:
    """MFU; None on a device whose peak is not known."""
    if not shape.device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(shape.device)
    peak = next((flops for model, flops in PEAK.items() if model in name), None)
    if peak is None:
        return None
    model = task(shape.model).build_model()
    attention = 12 * shape.model["layers"] * shape.model["d_model"] * shape.model["context"]
    return tokens_s * (6 * sum(p.numel() for p in model.parameters()) + attention) / peak


def main() -> None:
    parser = options(__doc__ or "", rounds=3, steps=12)
    parser.add_argument("--device", default="auto", help='"auto" (the default), "cpu" or "cuda:N"')
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--plain", action="store_true", help="be the plain loop, and print the time of a step")
    chosen = parser.parse_args()
    found = "cuda:0" if torch.cuda.is_available() else "cpu"
    shape = Shape(found if chosen.device == "auto" else chosen.device)
    if chosen.plain:
        be_plain(shape, chosen.steps, chosen.compile)
        return
    name = torch.cuda.get_device_name(shape.device) if shape.device != "cpu" else "CPU, a tiny model"
    samples = run(
        "gpu_step",
        {
            "plain": lambda: plain(shape, chosen.steps, chosen.compile),
            "ours": lambda: ours(shape, chosen.steps, chosen.compile),
        },
        KEYS,
        f"{name}: {shape.tokens:,} tokens a step, bf16 autocast, {shape.partitions} partitions",
        chosen,
    )
    for side, measured in samples.items():
        share = utilization(shape, statistics.median(measured["tokens_s"]))
        print(f"MFU of {side}: {'not known for this device' if share is None else f'{share:.1%}'}")
    digests = {workers: digest(shape, workers, 4) for workers in (1, 2)}
    print("the same bits with one and two trainers:", "yes" if len(set(digests.values())) == 1 else f"NO {digests}")
    if len(set(digests.values())) > 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
