"""No operation reads a parameter before its bucket has landed, by whatever way the model uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from psworker.trainer.values import PullGuard, sees_everything


class Roundabout(nn.Module):
    """Uses parameters through modules, past them, by index, in lists, by keyword, and in a custom Function."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.twisted = nn.Parameter(torch.ones(8, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.experts = nn.ParameterList(nn.Parameter(torch.ones(8)) for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.tokens.weight[0]
        x, _ = self.attention(x, x, x)
        x, _ = self.memory(x)
        x = self.layer(self.norm(x))
        x = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        x = Twist.apply(x, self.twisted)
        x = x * self.scale.data + torch.stack(list(self.experts)).sum(0)
        return functional.linear(x, weight=self.head.weight)


class Twist(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        del ctx
        return x @ weight


def test_each_parameter_is_waited_for_before_it_is_read() -> None:
    torch.manual_seed(0)
    model = Roundabout().train()
    tokens = torch.randint(0, 10, (2, 4))
    torch.manual_seed(1)
    expected = model(tokens)
    parameters = list(model.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.fill_(float("nan"))  # nothing has landed
    landed: list[int] = []

    def land(bucket: int) -> None:
        landed.append(bucket)
        with torch.no_grad():
            parameters[bucket].copy_(values[bucket])

    torch.manual_seed(1)
    for buffer in model.buffers():
        buffer.zero_()
    with PullGuard({id(p): number for number, p in enumerate(parameters)}, land):
        seen = model(tokens)
    assert torch.equal(seen, expected)
    assert sorted(landed) == list(range(len(parameters)))  # each once, and all of them


def test_a_model_in_torchscript_is_not_trusted_to_the_guard() -> None:
    assert sees_everything(Roundabout())
    assert not sees_everything(nn.Sequential(torch.jit.script(nn.Linear(2, 2))))
