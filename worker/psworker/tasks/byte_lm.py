"""What the byte-level language models share: windows of text, the loss, bits per byte, and sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pscluster.errors import DataError
from pscluster.task import Task
from psworker.tasks.gpt import GPT, continue_tokens

VOCABULARY = 256


class ByteWindows:
    """Disjoint windows of a text: sample i is bytes [i * context, (i + 1) * context], one more than `context`.

    As a uint8 tensor of shape (context + 1,): input and target, shifted by one, so that every byte but the very
    first is a target exactly once. A rest shorter than a window is left out."""

    def __init__(self, text: bytes, context: int) -> None:
        self._text = np.frombuffer(text, dtype=np.uint8)
        self._context = context

    def __len__(self) -> int:
        return max(0, len(self._text) - 1) // self._context

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"no window {index} of {len(self)}")
        first = index * self._context
        return torch.from_numpy(self._text[first : first + self._context + 1].copy())


@dataclass(eq=False)
class ByteLm(Task):
    """A GPT over bytes. Subclasses say what the texts are."""

    layers: int = 4
    d_model: int = 128
    heads: int = 4
    context: int = 128
    dropout: float = 0.0

    def texts(self) -> tuple[bytes, bytes]:
        """(training text, held-out text)."""
        raise NotImplementedError(f"{type(self).__name__} must define texts()")

    def build_model(self) -> nn.Module:
        return GPT(VOCABULARY, self.context, self.layers, self.d_model, self.heads, self.dropout)

    def train_data(self) -> ByteWindows:
        return self._windows(self.texts()[0], "training")

    def eval_data(self) -> ByteWindows:
        return self._windows(self.texts()[1], "held-out")

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        tokens = batch.long()
        logits = model(tokens[:, :-1])
        loss_sum = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        return loss_sum, float(logits.shape[0] * logits.shape[1])

    def finalise(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        return {"bits_per_byte": float(statistics["loss_sum"] / statistics["weight"]) / math.log(2)}

    def generate(self, model: nn.Module, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
        tokens = list(prompt.encode()) or [ord("\n")]
        tokens = continue_tokens(model, tokens, self.context, max_new_tokens, temperature, seed)
        return bytes(tokens).decode("utf-8", "replace")

    def _windows(self, text: bytes, which: str) -> ByteWindows:
        windows = ByteWindows(text, self.context)
        if not len(windows):
            raise DataError(f"the {which} text has {len(text)} bytes, too few for a window of {self.context}")
        return windows
