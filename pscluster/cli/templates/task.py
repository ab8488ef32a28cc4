"""A small character language model: replace model and data by your own."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pscluster import Task


class CharacterLm(Task):
    """Learns to continue the text at data.uri. The arguments are the spec's task.args."""

    def __init__(self, context: int = 64, width: int = 64, layers: int = 2) -> None:
        self.context, self.width, self.layers = context, width, layers

    def build_model(self) -> nn.Module:
        return Model(self.context, self.width, self.layers)

    def train_data(self) -> list[tuple[Tensor, Tensor]]:
        return self.windows(Path(self.data_uri).read_bytes()[: -self.held_out()])

    def eval_data(self) -> list[tuple[Tensor, Tensor]]:
        return self.windows(Path(self.data_uri).read_bytes()[-self.held_out() :])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        """The SUM of the losses and how many were summed, so that batches of any size add up exactly."""
        text, following = batch
        return cross_entropy(model(text).flatten(0, 1), following.flatten(), reduction="sum"), following.numel()

    def finalise(self, statistics: Mapping[str, Tensor]) -> Mapping[str, float]:
        nats = float(statistics["loss_sum"] / statistics["weight"])
        return {"bits_per_character": nats / math.log(2)}

    def generate(self, model: nn.Module, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt.encode() or b"\n")
        for _ in range(max_new_tokens):
            logits = model(torch.tensor([text[-self.context :]]))[0, -1]
            if temperature == 0:
                text.append(int(logits.argmax()))
            else:
                chances = (logits / temperature).softmax(-1)
                text.append(int(torch.multinomial(chances, 1, generator=generator)))
        return bytes(text).decode("utf-8", "replace")

    def held_out(self) -> int:
        """How many bytes at the end of the text are kept for evaluation."""
        return Path(self.data_uri).stat().st_size // 10

    def windows(self, text: bytes) -> list[tuple[Tensor, Tensor]]:
        """Every window of `context` bytes, half overlapping, and the byte that follows each of them."""
        data = torch.tensor(list(text))
        starts = range(0, len(data) - self.context, max(1, self.context // 2))
        return [(data[i : i + self.context], data[i + 1 : i + self.context + 1]) for i in starts]


class Model(nn.Module):
    """A transformer over bytes that looks only back."""

    def __init__(self, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        x = self.embed(text) + self.place(torch.arange(length))
        future = torch.full((length, length), float("-inf")).triu(1)
        logits: Tensor = self.head(self.blocks(x, mask=future))
        return logits
