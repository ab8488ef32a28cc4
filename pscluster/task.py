"""The user's interface: one class defines the model, the data and the loss.

    class MyTask(Task):
        def __init__(self, width: int = 64) -> None:   # the spec's task.args, by keyword
            self.width = width

        def build_model(self): return nn.Linear(self.width, 2)
        def train_data(self): return MyDataset(self.data_uri)
        def loss(self, model, batch):
            x, y = batch
            return F.cross_entropy(model(x), y, reduction="sum"), len(y)

The same class runs in every trainer, so everything it returns must be a pure function of its arguments, of
`data_uri` and of `seed`. Random draws (dropout, augmentation) go through the global generators of torch,
numpy and `random`: they are seeded anew for every (step, shard), which is what makes a step exact on any
number of workers. A generator of your own, a clock, or a counter that changes a result is found before step 0:
the preflight reads each sample of a microbatch, and computes the microbatch, twice; then once more after another one,
with a second model that a copy of the task builds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class MapDataset(Protocol):
    """A map-style data set: any list, `torch.utils.data.Dataset` or object with these two methods."""

    def __len__(self) -> int:
        """How many samples there are; the same on every node."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Sample `index`, 0 <= index < len; the same content on every node and at every call."""
        ...


class Task:
    """Base class of every task. `build_model`, `train_data` and `loss` must be given, the rest may be.

    `data_uri` (the spec's data.uri, unread) and `seed` (train.seed) are set after the constructor and before
    anything else is called.

    Each process has a working directory of its own, which begins as a copy of the submitted directory and is removed
    with the process: relative paths lead to the submitted files, and what is written there nobody else ever reads. What
    must outlive a process goes to one of two directories, which are there before the constructor runs:

    - `scratch_dir`: this job's on this node. Its trainers here share it; it is empty at first and removed when the job
      ends.
    - `cache_dir`: this node's. All jobs share it, now and later, so it is for what is the same for everyone, such as a
      download: write it under another name and rename it when it is whole. Beyond a limit (`psworker --cache-bytes`)
      the entries that were used least recently are removed, while no trainer runs on the node.
    """

    data_uri: str = ""
    seed: int = 0
    scratch_dir: Path = Path()
    cache_dir: Path = Path()
    # False: the loss couples the samples of a batch (in-batch negatives), so the preflight does not halve one.
    loss_adds_up: bool = True

    def build_model(self) -> nn.Module:
        """The model, on the CPU, freshly initialised. torch is seeded beforehand; what trains is float32.

        Every trainer builds one and compares its names and shapes with the others'; the values of one of
        them become step 0. Lazy modules get their shapes from the first batch. From then on the model keeps its
        modules, parameters and what of them trains; the spec's train.unfreeze_at thaws parameters at a step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build_model()")

    def train_data(self) -> MapDataset:
        """The training samples. Raise FileNotFoundError with the path when they are not there."""
        raise NotImplementedError(f"{type(self).__name__} must define train_data()")

    def eval_data(self) -> MapDataset | None:
        """The held-out samples; None: the job is not evaluated."""
        return None

    def collate(self, samples: Sequence[Any]) -> Any:
        """One batch from a non-empty list of samples; by default tensors are stacked along a new first
        axis.
        """
        from torch.utils.data import default_collate

        return default_collate(list(samples))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, float | Tensor]:
        """(loss_sum, weight): the SUM of the losses in `batch` as a scalar tensor that requires grad, and how
        many were summed (tokens, samples). The job's loss is the sum of the first over the sum of the second,
        so a mean here would be wrong; the preflight catches it by halving a batch. It may change buffers, but not
        write to parameters: every shard of a step starts from the same ones."""
        raise NotImplementedError(f"{type(self).__name__} must define loss()")

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor | float]:
        """Statistics of `batch` that may simply be ADDED over batches (counts, sums, confusion matrices).

        Called in eval mode without gradients. Every batch must give the same names and shapes.
        """
        del model, batch
        return {}

    def finalise(self, statistics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """The metrics people read, from statistics added over all of `eval_data`.

        `statistics` holds what `metrics` returned, as float64 CPU tensors, and beside it "loss_sum" and
        "weight". "loss" is always reported and need not be returned.
        """
        del statistics
        return {}

    def generate(self, model: nn.Module, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
        """A continuation of `prompt`, prompt included. Pure in its arguments; temperature 0 is greedy."""
        raise NotImplementedError(f"{type(self).__name__} does not generate")
