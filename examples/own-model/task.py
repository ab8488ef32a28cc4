"""A user's own model: it predicts which of two interleaved spirals a point is on. Needs only this directory."""

import math

import torch
from torch import nn
from torch.nn import functional

from pscluster.task import Task


class Spirals(Task):
    def __init__(self, width: int = 64, points: int = 4000) -> None:
        self.width = width
        self.points = points

    def build_model(self) -> nn.Module:
        width = self.width
        return nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def train_data(self) -> list[tuple[torch.Tensor, int]]:
        return [point(i) for i in range(self.points)]

    def eval_data(self) -> list[tuple[torch.Tensor, int]]:
        return [point(self.points + i) for i in range(1000)]

    def loss(self, model: nn.Module, batch: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
        x, label = batch
        return functional.cross_entropy(model(x), label, reduction="sum"), len(
            label
        )  # the sum, and the number of losses in it

    def metrics(self, model: nn.Module, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        x, label = batch
        return {"right": (model(x).argmax(-1) == label).sum()}  # may be added over batches

    def finalise(self, statistics: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"accuracy": float(statistics["right"] / statistics["weight"])}


def point(index: int) -> tuple[torch.Tensor, int]:
    """Sample `index`: a point with a little noise, and its spiral. The same on every machine."""
    draw = torch.Generator().manual_seed(index)
    turn, noise = torch.rand((), generator=draw).item(), torch.randn(2, generator=draw) / 40
    angle = 3 * math.pi * turn + math.pi * (index % 2)
    return torch.tensor([math.cos(angle), math.sin(angle)]) * (0.1 + turn) + noise, index % 2
