"""A job that a test holds in mid-run for as long as it needs, without pauses to tune and without races.

`held_spec` writes this very file into the directory that is submitted; its trainers stop before a microbatch while the
gate file exists, and go on when it is removed. The bits are those of SyntheticLm.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from psworker.tasks.synthetic import SyntheticLm


class Held(SyntheticLm):
    """Every trainer computes `free` microbatches in train mode (the preflight's three among them), then observes the
    gate that data.uri names."""

    def __init__(self, free: int = 0, **args: Any) -> None:
        super().__init__(**args)
        self.free = free
        self.computed = 0

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        self.computed += model.training
        while self.computed > self.free and Path(self.data_uri).exists():
            time.sleep(0.01)
        return super().loss(model, batch)


def held_spec(spec: dict[str, Any], directory: Path, free: int) -> tuple[dict[str, Any], Path]:
    """The spec of a SyntheticLm job with a gate, to be submitted from `directory`; and the gate, closed."""
    (directory / "held_task.py").write_text(Path(__file__).read_text())
    gate = directory / "gate"
    gate.touch()
    args = {**spec["task"]["args"], "free": free}
    return {**spec, "task": {"entrypoint": "held_task:Held", "args": args}, "data": {"uri": str(gate)}}, gate
