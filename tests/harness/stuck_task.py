"""A job of which one trainer, the first to get there, is stuck in user code until a test releases it.

`stuck_spec` writes this very file into the directory that is submitted. The bits are those of SyntheticLm.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from psworker.tasks.synthetic import SyntheticLm


class Stuck(SyntheticLm):
    """After `free` microbatches in train mode the first trainer to rename the bait that data.uri names is stuck for as
    long as the renamed file exists. It sleeps: its other threads continue."""

    def __init__(self, free: int = 0, **args: Any) -> None:
        super().__init__(**args)
        self.free = free
        self.computed = 0

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        self.computed += model.training
        bait = Path(self.data_uri)
        if self.computed > self.free and bait.exists():
            with contextlib.suppress(FileNotFoundError):  # another trainer was first
                caught = bait.rename(bait.with_name("caught"))
                while caught.exists():
                    time.sleep(0.01)
        return super().loss(model, batch)


def stuck_spec(spec: dict[str, Any], directory: Path, free: int) -> tuple[dict[str, Any], Path]:
    """The spec of a SyntheticLm job with a bait, to be submitted from `directory`; and the file to remove, once it is
    there, to release the stuck trainer."""
    (directory / "stuck_task.py").write_text(Path(__file__).read_text())
    bait = directory / "bait"
    bait.touch()
    args = {**spec["task"]["args"], "free": free}
    made = {**spec, "task": {"entrypoint": "stuck_task:Stuck", "args": args}, "data": {"uri": str(bait)}}
    return made, bait.with_name("caught")
