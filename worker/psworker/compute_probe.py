"""Measures how fast one device multiplies float32 matrices; runs as a process of its own.

    python -P -m psworker.compute_probe DEVICE THREADS

prints {"flops_per_s": ..., "threads": ...}. The workload is fixed for each kind of device, so that nodes can be
compared; it is neither the peak of the hardware nor the speed of a model."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from psworker.numerics import settle_numerics

SIZES = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices, by kind of device."""
MEASURE_S = 1.0
MIN_RUNS = 3
_WARM_UP_RUNS = 2


def main(arguments: Sequence[str]) -> None:
    device, threads = arguments[0], int(arguments[1])
    settle_numerics(threads, device)
    kind = torch.device(device).type
    flops_per_s = measure(device, SIZES[kind])
    print(json.dumps({"flops_per_s": flops_per_s, "threads": threads if kind == "cpu" else 0}))


def measure(device: str, size: int, measure_s: float = MEASURE_S) -> float:
    """Operations a second of the median multiplication, over about `measure_s`. Raises RuntimeError of torch for a
    device that it cannot use."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.rand(size, size, device=device, generator=generator) for _ in range(2))
    result = torch.empty(size, size, device=device)
    for _ in range(_WARM_UP_RUNS):
        _multiply(left, right, result)
    taken_s: list[float] = []
    until_s = time.perf_counter() + measure_s
    while len(taken_s) < MIN_RUNS or time.perf_counter() < until_s:
        taken_s.append(_multiply(left, right, result))
    return 2 * size**3 / statistics.median(taken_s)


def _multiply(left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> float:
    """The seconds that one multiplication takes."""
    began_s = time.perf_counter()
    torch.mm(left, right, out=result)
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main(sys.argv[1:])
