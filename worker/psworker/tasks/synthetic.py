"""Two tiny tasks whose data are a pure function of the sample's index: for tests, golden hashes and first steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pscluster.task import Task
from psworker.tasks.gpt import GPT, continue_tokens

S = TypeVar("S")

_PRIME = 2_147_483_647
_HELD_OUT_FROM = 1 << 20  # held-out samples are those of the indices from here on
_FEATURES = 12
_RARE = 37


def integers(index: int, count: int, below: int) -> list[int]:
    """`count` numbers in range(below) from exact integer arithmetic on `index`, the same on every machine."""
    state = (index * 48_271 + 11) % _PRIME
    values = []
    for _ in range(count):
        state = state * 16_807 % _PRIME
        values.append((state >> 7) % below)
    return values


@dataclass(frozen=True)
class Made(Generic[S]):
    """`length` samples, made by `make(first + index)` when asked for."""

    make: Callable[[int], S]
    length: int
    first: int = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> S:
        if not 0 <= index < self.length:
            raise IndexError(f"no sample {index} of {self.length}")
        return self.make(self.first + index)


@dataclass(eq=False)
class SyntheticLm(Task):
    """A tiny Transformer with dropout and tied embeddings on sequences that follow a rule, with exceptions.

    `pause_s` makes every microbatch take that much longer, for runs that are to be watched or disturbed."""

    layers: int = 2
    d_model: int = 32
    heads: int = 2
    context: int = 16
    dropout: float = 0.1
    vocabulary: int = 48
    num_samples: int = 512
    held_out: int = 48
    pause_s: float = 0.0

    def build_model(self) -> nn.Module:
        return GPT(self.vocabulary, self.context, self.layers, self.d_model, self.heads, self.dropout)

    def train_data(self) -> Made[Tensor]:
        return Made(self._sequence, self.num_samples)

    def eval_data(self) -> Made[Tensor] | None:
        return Made(self._sequence, self.held_out, _HELD_OUT_FROM) if self.held_out else None

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        time.sleep(self.pause_s)
        logits = model(batch[:, :-1])
        targets = batch[:, 1:].flatten()
        return functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"), float(len(targets))

    def metrics(self, model: nn.Module, batch: Tensor) -> Mapping[str, Tensor | float]:
        right = model(batch[:, :-1]).argmax(-1) == batch[:, 1:]
        return {"right": right.sum()}

    def finalise(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        return {"accuracy": float(statistics["right"] / statistics["weight"])}

    def generate(self, model: nn.Module, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
        """Tokens are written as numbers with spaces between them."""
        tokens = [int(word) % self.vocabulary for word in prompt.split()] or [0]
        tokens = continue_tokens(model, tokens, self.context, max_new_tokens, temperature, seed)
        return " ".join(map(str, tokens))

    def _sequence(self, index: int) -> Tensor:
        """int64 (context + 1,): each token follows from the last two, but for about one in eight."""
        draws = integers(index, 2 * (self.context + 1), 1 << 16)
        tokens = [draw % self.vocabulary for draw in draws[:2]]
        for position in range(2, self.context + 1):
            surprise = draws[2 * position] % 8 == 0
            rule = 3 * tokens[-1] + tokens[-2] + 1
            tokens.append((draws[2 * position + 1] if surprise else rule) % self.vocabulary)
        return torch.tensor(tokens)


class NormNet(nn.Module):
    """Convolution, batch norm, and an expert that only marked samples pass: (batch, features) -> (batch, classes)."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.hidden = nn.Linear(width, width)
        self.hidden_norm = nn.BatchNorm1d(width)
        self.expert = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, marked: Tensor) -> Tensor:
        h = functional.relu(self.norm(self.convolution(x[:, None]))).mean(-1)
        h = functional.relu(self.hidden_norm(self.hidden(h)))
        if marked.any():
            h = h + self.expert(h) * marked[:, None]
        return self.head(self.dropout(h))  # type: ignore[no-any-return]


@dataclass(eq=False)
class SyntheticNorm(Task):
    """BatchNorm buffers, and a parameter that backward touches only where a batch holds a marked sample.

    One sample in 37 is marked, so with small global batches some steps touch the expert and some do not."""

    width: int = 16
    classes: int = 4
    dropout: float = 0.1
    num_samples: int = 512
    held_out: int = 48
    pause_s: float = 0.0

    def build_model(self) -> nn.Module:
        return NormNet(self.width, self.classes, self.dropout)

    def train_data(self) -> Made[tuple[Tensor, int, bool]]:
        return Made(self._sample, self.num_samples)

    def eval_data(self) -> Made[tuple[Tensor, int, bool]] | None:
        return Made(self._sample, self.held_out, _HELD_OUT_FROM) if self.held_out else None

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
        time.sleep(self.pause_s)
        x, label, marked = batch
        return functional.cross_entropy(model(x, marked), label, reduction="sum"), float(len(label))

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Tensor | float]:
        """A confusion matrix (classes, classes): rows are labels, columns predictions."""
        x, label, marked = batch
        cells = label * self.classes + model(x, marked).argmax(-1)
        return {"confusion": torch.bincount(cells, minlength=self.classes**2).view(self.classes, -1)}

    def finalise(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        confusion = statistics["confusion"]
        return {"accuracy": float(confusion.trace() / confusion.sum())}

    def _sample(self, index: int) -> tuple[Tensor, int, bool]:
        """(float32 (features,), label, marked): the label is where the largest of the window sums is."""
        values = integers(index, _FEATURES, 1024)
        groups = [sum(values[group :: self.classes]) for group in range(self.classes)]
        x = torch.tensor([value / 512 - 1 for value in values])
        return x, groups.index(max(groups)), index % _RARE == 0
