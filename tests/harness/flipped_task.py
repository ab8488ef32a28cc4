"""A job in which a trainer gets one bit of one gradient wrong, once, in a chosen microbatch.

While the file "armed" is there, the first trainer that computes the microbatch flips the bit, and the file becomes
"WORKER.struck" of the worker that it runs on. While "impure" is there, every computation of the microbatch gives other
bits. `flipped_spec` writes this very file into the directory that is submitted. The bits are otherwise those of
SyntheticLm.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pscluster.step.audit import audited_shard
from pscluster.step.sampling import ShardSampler
from psworker.tasks.synthetic import SyntheticLm

FLIPPED = "blocks.1.wide"  # the parameters of which one is flipped begin with this


class Flipped(SyntheticLm):
    """The microbatch is the one whose samples are `target`."""

    def __init__(self, target: list[int], **args: Any) -> None:
        super().__init__(**args)
        self._target = torch.stack([self._sequence(index) for index in target])
        self._flips = 0
        self._count = itertools.count(1)

    def build_model(self) -> nn.Module:
        model = super().build_model()
        name, parameter = next(item for item in model.named_parameters() if item[0].startswith(FLIPPED))
        parameter.register_hook(self._flip)
        (Path(self.data_uri) / "parameter").write_text(name)
        return model

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        is_target = model.training and torch.is_grad_enabled() and torch.equal(batch, self._target)
        self._flips = self._strike() if is_target else 0
        return super().loss(model, batch)

    def _strike(self) -> int:
        """Which bit to flip; 0: none."""
        orders = Path(self.data_uri)
        worker = next(part for part in Path(__file__).parts if part.startswith("worker-"))  # whose copy this is
        with contextlib.suppress(FileNotFoundError):
            (orders / "armed").rename(orders / f"{worker}.struck")
            return 1
        if (orders / "impure").exists():
            (orders / f"{worker}.struck").touch()
            return 1 << next(self._count) + 3 * int(worker[-1])  # another one in each trainer, and each time
        return 0

    def _flip(self, gradient: Tensor) -> Tensor:
        if not self._flips:
            return gradient
        flips, self._flips = self._flips, 0
        changed = gradient.clone()
        words = changed.view(torch.int32).view(-1)
        words[5] ^= flips
        return changed


def flipped_spec(spec: dict[str, Any], directory: Path, version: int) -> tuple[dict[str, Any], Path]:
    """The spec of a SyntheticLm job all steps of which are audited, to be submitted from `directory`, and where its
    orders are looked for. The microbatch is the audited one of the step that starts from `version`."""
    (directory / "flipped_task.py").write_text(Path(__file__).read_text())
    orders = directory / "orders"
    orders.mkdir()
    train, args = spec["train"], spec["task"]["args"]
    num_shards = train["global_batch"] // train["microbatch"]
    shard = audited_shard(train["seed"], version, 1.0, num_shards)
    assert shard is not None
    sampler = ShardSampler(args["num_samples"], num_shards, train["microbatch"], train["seed"])
    task = {"entrypoint": "flipped_task:Flipped", "args": {**args, "target": sampler.indices(version, shard)}}
    (orders / "shard").write_text(json.dumps(shard))
    return {**spec, "task": task, "data": {"uri": str(orders)}, "audit": {"share": 1.0}}, orders
