"""A task that goes wrong in the way and in the place that its arguments name.

`author_spec` writes this very file into the directory that is submitted. What goes wrong is decided by the sample, so
that it is in the same step and shard of every run, however many workers there are.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pscluster import Task
from pscluster.step.sampling import ShardSampler

SAMPLES, SHARDS, MICROBATCH, SEED = 400, 2, 4, 3


class Wrong(Task):
    """`way`: what it does; `where`: in which method; `sample`: at which sample."""

    def __init__(self, way: str = "", where: str = "loss", sample: int = -1) -> None:
        self.way, self.where, self.sample = way, where, sample

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def train_data(self) -> Any:
        return Numbers(self)

    def eval_data(self) -> Any:
        return [torch.tensor([float(n), 1.0]) for n in range(8)] if self.where in ("metrics", "finalise") else None

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        batch = torch.stack(list(samples))
        self.reach("collate", batch)
        return batch

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        self.reach("loss", batch)
        total = (model(batch / SAMPLES) - 1).square().sum()
        if total.requires_grad:
            total.register_hook(lambda _: self.reach("backward", batch))
        if model.training and self.sample in batch[:, 0]:
            self.late = True
        return total, len(batch)

    def metrics(self, model: nn.Module, batch: Tensor) -> dict[str, float]:  # noqa: ARG002 - the contract's
        if getattr(self, "late", False):
            self.reach("metrics", None)
        return {"count": float(len(batch))}

    def finalise(self, statistics: Any) -> dict[str, float]:
        if getattr(self, "late", False):
            self.reach("finalise", None)
        return {"count": float(statistics["count"])}

    def reach(self, where: str, batch: Tensor | None) -> None:
        if where == self.where and (batch is None or self.sample in batch[:, 0]):
            self.go_wrong()

    def go_wrong(self) -> None:
        if self.way == "raise":
            raise ValueError("no such colour")
        if self.way == "exit":
            sys.exit(3)
        if self.way == "interrupt":
            raise KeyboardInterrupt
        if self.way.startswith("os._exit"):
            os._exit(int(self.way[-2]))
        if self.way == "thread":
            thread = threading.Thread(target=self.end_all)
            thread.start()
            thread.join()
        if self.way == "thread raises":
            thread = threading.Thread(target=self.raise_in_thread)
            thread.start()
            thread.join()
        if self.way == "SIGSEGV":
            ctypes.string_at(0)
        if self.way == "SIGABRT":
            os.abort()
        if self.way == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)

    def raise_in_thread(self) -> None:
        raise ValueError("no such thread")

    def end_all(self) -> None:
        os._exit(4)


class Numbers:
    """The samples 0, 1, ... in two columns."""

    def __init__(self, task: Wrong) -> None:
        self.task = task

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        sample = torch.tensor([float(index), 1.0])
        self.task.reach("getitem", sample[None])
        return sample


def author_spec(way: str, where: str, step: int, shard: int, workers: int) -> dict[str, Any]:
    """The spec of a job that goes wrong while `shard` of `step` (the first is 1) is computed."""
    sampler = ShardSampler(SAMPLES, SHARDS, MICROBATCH, SEED)
    usual = {(SAMPLES - 1) * k // 7 for k in range(8)}  # read by the preflight, too
    sample = next(index for index in sampler.indices(step - 1, shard) if index not in usual)
    name = f"{way}-{where}-{workers}".lower().translate(str.maketrans({"_": "", ".": "", "(": "", ")": "", " ": "-"}))
    train = {"global_batch": SHARDS * MICROBATCH, "microbatch": MICROBATCH, "max_steps": 30, "seed": SEED}
    return {
        "name": name,
        "task": {"entrypoint": "author_task:Wrong", "args": {"way": way, "where": where, "sample": sample}},
        "train": train | {"optimizer": {"name": "sgd", "lr": 0.01}},
        "evaluate": {"every_steps": 10},
        "durability": {"every_steps": 10},
        "workers": {"max": workers},
    }


def line_of(text: str) -> int:
    """The line of this file that consists of `text`."""
    lines = [line.strip() for line in Path(__file__).read_text().splitlines()]
    return lines.index(text) + 1
