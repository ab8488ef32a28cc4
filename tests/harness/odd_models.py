"""Tasks whose models are of the kinds of docs/models.md: each trains to exact bits, or is refused by name."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pscluster.task import Task


class Line(Task):
    """The sound base of the others."""

    def __init__(self, **args: object) -> None:
        self.args = args

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def train_data(self) -> Any:
        return [(x, x.sin()) for x in torch.linspace(-3, 3, 60).reshape(-1, 1)]

    def loss(self, model: Any, batch: Any) -> Any:
        x, y = batch
        return functional.mse_loss(model(x), y, reduction="sum"), len(x)


class Thaws(Line):
    """Layers are thawed by the task instead of by the spec."""

    calls = 0

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model[0].requires_grad_(False)  # type: ignore[index, operator]
        return model

    def loss(self, model: Any, batch: Any) -> Any:
        self.calls += model.training
        if self.calls > 4:
            model[0].requires_grad_(True)
        return super().loss(model, batch)


class Swaps(Thaws):
    """Values are written past torch's count."""

    def loss(self, model: Any, batch: Any) -> Any:
        self.calls += model.training
        if self.calls > 4:
            model[2].weight.data = model[2].weight.data * 0.5
        return Line.loss(self, model, batch)


class Moves(Line):
    """A float64 constant that moves once training is under way."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.register_buffer("scale", torch.ones(1).double())
        return model

    def loss(self, model: Any, batch: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + model.training
        if self.calls > 4:
            model.scale.mul_(2)
        return super().loss(model, batch)


class Prebuilt(Line):
    """The constructor builds the model, and loss() uses that one, whatever it is given."""

    def __init__(self, **args: object) -> None:
        super().__init__(**args)
        self.model = super().build_model()

    def build_model(self) -> nn.Module:
        return self.model

    def loss(self, model: Any, batch: Any) -> Any:
        del model
        return super().loss(self.model, batch)


class Tied(Task):
    """An embedding and a head of the same weights; `through` data, or as one Parameter."""

    def __init__(self, through: str = "data") -> None:
        self.through = through

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        if self.through == "data":
            model[1].weight.data = model[0].weight.data
        else:
            model[1].weight = model[0].weight
        return model

    def train_data(self) -> Any:
        return [torch.tensor(i % 10) for i in range(60)]

    def loss(self, model: Any, batch: Any) -> Any:
        return functional.cross_entropy(model(batch), batch, reduction="sum"), len(batch)


class Lazy(Line):
    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(1))


class OnMeta(Line):
    def build_model(self) -> nn.Module:
        with torch.device("meta"):
            return nn.Linear(1, 1)


class Cached(nn.Module):
    """A linear layer with a cache that forward grows."""

    positions: Tensor

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("positions", torch.zeros(0), persistent=persistent)

    def forward(self, x: Tensor) -> Any:
        if len(self.positions) < len(x):
            self.positions = torch.full((len(x),), 0.5)
        return self.linear(x) + self.positions[: len(x), None]


class Grows(Line):
    """`persistent`: whether the cache is in the state dict."""

    def build_model(self) -> nn.Module:
        return Cached(bool(self.args.get("persistent")))


class Graph(nn.Module):
    """Constants of many kinds: a sparse adjacency, a complex phase, float64 and bfloat16 scales; and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("adjacency", (torch.rand(6, 6) > 0.5).float().to_sparse())
        self.register_buffer("compressed", torch.eye(6).double().to_sparse_csr())
        self.register_buffer("phase", torch.randn(6, dtype=torch.complex64))
        self.register_buffer("wide", torch.rand(6).double())
        self.register_buffer("narrow", torch.rand(6).bfloat16())

    def forward(self, x: Tensor) -> Any:
        hidden = torch.sparse.mm(self.adjacency, self.weight(x).t()).t()
        return self.norm(hidden) * self.phase.abs() * self.wide.float() * self.narrow.float()


class Graphs(Line):
    def build_model(self) -> nn.Module:
        return Graph()

    def loss(self, model: Any, batch: Any) -> Any:
        x, y = batch
        return (model(x.expand(-1, 6)).mean(dim=1, keepdim=True) - y).square().sum(), len(x)


class Fitted(nn.Module):
    """Its first batch initialises a buffer; another one tells that."""

    mean: Tensor
    ready: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 16)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Any:
        if not self.ready:
            self.mean.copy_(x.mean(dim=0))
            self.ready.fill_(True)
        return self.linear(x - self.mean)


class Fits(Line):
    def build_model(self) -> nn.Module:
        return nn.Sequential(Fitted(), nn.Tanh(), nn.Linear(16, 1))


class Masked(Line):
    """Batch statistics that move beside constants that are not finite."""

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
        model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        model.register_buffer("none", torch.tensor(float("nan")))
        return model


class Adapter(nn.Module):
    """A frozen base in bfloat16 with a low-rank addition that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(16, 16).bfloat16(), requires_grad=False)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x: Tensor) -> Any:
        return x @ self.base.float() + self.up(self.down(x))


class Adapted(Line):
    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 16), Adapter(), nn.Linear(16, 1))


class Images(Line):
    """A convolutional model in channels_last."""

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(64, 1))
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def loss(self, model: Any, batch: Any) -> Any:
        x, y = batch
        return super().loss(model, (x[:, :, None, None].expand(-1, 3, 4, 4) * 1.0, y))


@dataclass(frozen=True)
class Points:
    """A batch of the task's own type, which holds another one."""

    x: Tensor
    rest: Attributes


class Attributes(UserDict):  # type: ignore[type-arg]
    __getattr__ = UserDict.__getitem__


class Batched(Line):
    def collate(self, samples: Any) -> Any:
        return Points(torch.stack([x for x, _ in samples]), Attributes(y=torch.stack([y for _, y in samples])))

    def loss(self, model: Any, batch: Any) -> Any:
        return super().loss(model, (batch.x, batch.rest.y))
