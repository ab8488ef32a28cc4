"""A job that is slow while a test disturbs it, and fast once the test is done.

`paced_spec` writes this very file into the directory that is submitted; its trainers pause before every microbatch
while the pace file exists. The bits are those of SyntheticLm.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from psworker.tasks.synthetic import SyntheticLm


class Paced(SyntheticLm):
    """Each microbatch in train mode takes `slow_s` longer while the file that data.uri names exists, and prints it."""

    def __init__(self, slow_s: float = 0.05, **args: Any) -> None:
        super().__init__(**args)
        self.slow_s = slow_s

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        if model.training and Path(self.data_uri).exists():
            time.sleep(self.slow_s)
            print("goes slowly", flush=True)
        return super().loss(model, batch)


def paced_spec(spec: dict[str, Any], directory: Path, slow_s: float = 0.05) -> tuple[dict[str, Any], Path]:
    """The spec of a SyntheticLm job with a pace, to be submitted from `directory`; and the pace file: slow while it is
    there."""
    (directory / "paced_task.py").write_text(Path(__file__).read_text())
    pace = directory / "pace"
    pace.touch()
    args = {**spec["task"]["args"], "slow_s": slow_s}
    return {**spec, "task": {"entrypoint": "paced_task:Paced", "args": args}, "data": {"uri": str(pace)}}, pace
