"""A job with a straggler. A test sets its speed with two files, so that it does not end before the test is done.

While the file "paced" exists every microbatch takes `pace_s`, and while "slow" exists it takes `slow_s` on one worker,
the straggler. Without them it goes as fast as it can. `slow_spec` writes this very file into the directory that is
submitted; a worker knows itself by the directory that its bundle lies in. The bits are those of SyntheticLm.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from psworker.tasks.synthetic import SyntheticLm


class Slow(SyntheticLm):
    """Observes the files in the directory that data.uri names."""

    def __init__(self, pace_s: float, worker: str = "", slow_s: float = 0.0, **args: Any) -> None:
        super().__init__(**args)
        self.pace_s = pace_s
        self.slow_s = slow_s if worker in Path(__file__).parts else 0.0

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        if model.training:
            files = Path(self.data_uri)
            if self.slow_s and (files / "slow").exists():
                time.sleep(self.slow_s)
            elif (files / "paced").exists():
                time.sleep(self.pace_s)
        return super().loss(model, batch)


def slow_spec(spec: dict[str, Any], directory: Path, **args: Any) -> tuple[dict[str, Any], Path]:
    """The spec of a SyntheticLm job with those files, to be submitted from `directory`; and their directory, where
    both exist. `args`: of `Slow`."""
    (directory / "slow_task.py").write_text(Path(__file__).read_text())
    files = directory / "files"
    files.mkdir()
    for name in ("paced", "slow"):
        (files / name).touch()
    task = {"entrypoint": "slow_task:Slow", "args": {**spec["task"]["args"], **args}}
    return {**spec, "task": task, "data": {"uri": str(files)}}, files
