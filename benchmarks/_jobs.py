"""The model of the benchmarks, and the jobs that train it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psworker.tasks.synthetic import SyntheticLm

GPT_12M = {"layers": 6, "d_model": 384, "heads": 6, "context": 64, "vocabulary": 4096, "dropout": 0.0}
MICROBATCH = 4
SKIP = 6  # steps at the start of a run that no measurement counts
NUM_SAMPLES = 4096
OPTIMIZER: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.1}
CLIP_NORM = 1.0

# What our trainers set for themselves (psworker.trainer.device), for a baseline that is to have it, too.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_DYNAMIC": "false"}


def task(model: Mapping[str, Any] = GPT_12M) -> SyntheticLm:
    """The language model and its data, as the spec's entrypoint makes them."""
    return SyntheticLm(**model, num_samples=NUM_SAMPLES, held_out=0)


def spec(
    *,
    workers: int,
    partitions: int,
    steps: int,
    transport: str,
    accumulate: int = 1,
    codec: str = "fp32",
    model: Mapping[str, Any] = GPT_12M,
    microbatch: int = MICROBATCH,
) -> dict[str, Any]:
    """`accumulate` microbatches a worker and step; no snapshot and no evaluation between first step and last."""
    return {
        "name": "bench",
        "task": {
            "entrypoint": "psworker.tasks.synthetic:SyntheticLm",
            "args": {**model, "num_samples": NUM_SAMPLES, "held_out": 0},
        },
        "train": {
            "global_batch": microbatch * workers * accumulate,
            "microbatch": microbatch,
            "max_steps": steps,
            "clip_norm": CLIP_NORM,
            "optimizer": {"name": "adamw", **OPTIMIZER},
        },
        "workers": {"min": workers, "max": workers},
        "servers": {"partitions": partitions},
        "durability": {"every_steps": 100_000},
        "network": {"transport": transport, "push_codec": codec, "pull_codec": codec},
    }
