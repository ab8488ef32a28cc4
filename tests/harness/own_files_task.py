"""A task that writes to its working directory, its scratch directory and its cache, and trains on what it finds there.

`own_files_spec` writes this very file into the directory that is submitted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pscluster import Task


class OwnFiles(Task):
    """Every trace that another job has left shifts the data, and so the bits."""

    def __init__(self) -> None:
        print("listed", *sorted(os.listdir()))
        print("cached", (self.cache_dir / "download").exists())
        self.shift = float(Path("data/shift.txt").read_text())
        for trace in (Path("trace.txt"), Path(__file__).with_name("beside.txt"), self.scratch_dir / "trace.txt"):
            self.shift += 10.0 * trace.exists()
            trace.write_text("seen")
        Path("data/shift.txt").write_text("20.0")
        with Path(__file__).open("a") as file:
            file.write("raise SystemExit\n")
        partial = self.cache_dir / f"download.{os.getpid()}"
        partial.write_text("the same for everyone")
        partial.rename(self.cache_dir / "download")

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def train_data(self) -> Any:
        return [(x, x.sin() + self.shift) for x in torch.linspace(-3, 3, 64).reshape(-1, 1)]

    def eval_data(self) -> Any:
        return self.train_data()[:8]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return nn.functional.mse_loss(model(x), y, reduction="sum"), len(x)


def own_files_spec(directory: Path, workers: int) -> dict[str, Any]:
    """The spec of such a job, to be submitted from `directory`."""
    (directory / "data").mkdir(exist_ok=True)
    (directory / "data" / "shift.txt").write_text("0.5")
    (directory / "own_files_task.py").write_text(Path(__file__).read_text())
    train = {"global_batch": 8, "microbatch": 4, "max_steps": 4}
    return {
        "name": f"own-files-{workers}",
        "task": {"entrypoint": "own_files_task:OwnFiles"},
        "train": train | {"optimizer": {"name": "sgd", "lr": 0.01}},
        "workers": {"min": workers, "max": workers},
    }
