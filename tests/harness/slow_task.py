"""A job with a straggler: while a file exists, one worker takes several times as long for a microbatch as the others.

`slow_spec` writes this very file into the directory that is submitted. A worker knows itself by the directory that its
bundle lies in. The bits are those of SyntheticLm.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from psworker.tasks.synthetic import SyntheticLm


class Slow(SyntheticLm):
    """Every microbatch takes `pause_s` more; on `worker`, `slow_s` while the file that data.uri names exists."""

    def __init__(self, worker: str = "", slow_s: float = 0.0, **args: Any) -> None:
        super().__init__(**args)
        self.slow_s = slow_s
        self.is_there = worker in Path(__file__).parts

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        if model.training and self.is_there and Path(self.data_uri).exists():
            time.sleep(self.slow_s - self.pause_s)
        return super().loss(model, batch)


def slow_spec(spec: dict[str, Any], directory: Path, worker: str, slow_s: float) -> tuple[dict[str, Any], Path]:
    """The spec of a SyntheticLm job with a straggler, to be submitted from `directory`; and the file, which exists."""
    (directory / "slow_task.py").write_text(Path(__file__).read_text())
    slow = directory / "slow"
    slow.touch()
    args = {**spec["task"]["args"], "worker": worker, "slow_s": slow_s}
    return {**spec, "task": {"entrypoint": "slow_task:Slow", "args": args}, "data": {"uri": str(slow)}}, slow
