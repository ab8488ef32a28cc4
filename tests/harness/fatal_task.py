"""A task whose trainers kill themselves, each time in another phase of a step.

`fatal_spec` writes this very file into the directory that is submitted. The bits are those of SyntheticLm.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psworker.tasks.synthetic import SyntheticLm

PHASES = ("pull", "forward", "backward", "push", "evaluate")
FREE = 13  # batches that a process computes undisturbed, including the preflight's nine


class Fatal(SyntheticLm):
    """The phases in turn, each in one process, which leaves a file of that name in the directory of data.uri.

    pull: while its batch is made, and values are still arriving; forward: half through the model; backward: before the
    first gradient; push: when gradients of the last layers were handed over; evaluate: in the middle of an evaluation.
    """

    def build_model(self) -> nn.Module:
        model = super().build_model()
        parameters = list(model.parameters())
        middle = parameters[len(parameters) // 2]
        middle.register_post_accumulate_grad_hook(lambda _: self._reach("push"))
        layers = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        layers[len(layers) // 2].register_forward_hook(lambda *_: self._reach("forward"))
        self.computed = 0
        self.model = model
        return model

    def collate(self, samples: Sequence[Any]) -> Any:
        self._reach("pull")
        return super().collate(samples)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        if not model.training:
            self._reach("evaluate")
        self.computed += 1
        loss, weight = super().loss(model, batch)
        if loss.requires_grad and torch.is_grad_enabled():
            loss.register_hook(lambda _: self._reach("backward"))
        return loss, weight

    def _reach(self, phase: str) -> None:
        """Kill this process if `phase` is the next phase to do so."""
        if getattr(self, "computed", 0) <= FREE:
            return
        marks = Path(self.data_uri)
        todo = [name for name in PHASES if not (marks / name).exists()]
        if todo and todo[0] == phase:
            (marks / phase).touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)


def fatal_spec(spec: dict[str, Any], directory: Path) -> tuple[dict[str, Any], Path]:
    """The spec of a job whose trainers die, to be submitted from `directory`; and the directory of marks."""
    (directory / "fatal_task.py").write_text(Path(__file__).read_text())
    marks = directory / "marks"
    marks.mkdir()
    task = {"entrypoint": "fatal_task:Fatal", "args": spec["task"]["args"]}
    return {**spec, "task": task, "data": {"uri": str(marks)}}, marks
