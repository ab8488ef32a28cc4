"""Specs of the small jobs of the exactness tests, and the shard splits that they are trained with."""

from __future__ import annotations

from typing import Any

# Two buckets of several blocks each: every partition of three holds part of both.
LM = {"layers": 2, "d_model": 256, "heads": 4, "context": 16, "vocabulary": 512, "num_samples": 96}
Split = list[list[tuple[int, int]]]


def lm_spec(*, partitions: int = 1, steps: int = 10, transport: str = "auto", **args: Any) -> dict[str, Any]:
    """A Transformer LM with dropout, tied embeddings, clipping, AdamW, weight decay groups, cosine schedule."""
    return _spec("psworker.tasks.synthetic:SyntheticLm", LM | args, partitions, steps, transport)


def norm_spec(*, partitions: int = 1, steps: int = 10, transport: str = "auto") -> dict[str, Any]:
    """A model with BatchNorm buffers and a parameter that not every microbatch touches."""
    return _spec("psworker.tasks.synthetic:SyntheticNorm", {}, partitions, steps, transport)


def _spec(entrypoint: str, args: dict[str, Any], partitions: int, steps: int, transport: str) -> dict[str, Any]:
    return {
        "name": "exact",
        "task": {"entrypoint": entrypoint, "args": args},
        "train": {
            "global_batch": 14,
            "microbatch": 2,
            "max_steps": steps,
            "seed": 3,
            "clip_norm": 1.0,
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup_steps": 3},
        },
        "workers": {"max": 7},
        "servers": {"partitions": partitions},
        "durability": {"every_steps": 4},
        "evaluate": {"every_steps": 5},
        "network": {"transport": transport},
    }


def even_split(num_shards: int, workers: int) -> Split:
    """Contiguous runs, the first ones longer."""
    runs, at = [], 0
    for rank in range(workers):
        count = num_shards // workers + (rank < num_shards % workers)
        runs.append([(at, count)])
        at += count
    return runs


def crossed_split(num_shards: int, workers: int) -> Split:
    """Every worker has every `workers`-th shard: no two neighbours together."""
    return [[(shard, 1) for shard in range(rank, num_shards, workers)] for rank in range(workers)]
