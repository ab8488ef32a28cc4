"""Sentiment of film reviews (IMDb, Maas et al. 2011): a small Transformer encoder over hashed words."""

from __future__ import annotations

import csv
import lzma
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from pscluster.errors import DataError
from pscluster.task import Task

_WORD = re.compile(r"[a-z0-9']+|[!?.,]")
_PADDING = 0

Batch = tuple[Tensor, Tensor]


@dataclass(eq=False)
class ImdbClassification(Task):
    """Positive or negative, from train.csv.xz and test.csv.xz (columns text, label) in the directory data.uri.

    Words are hashed into `vocabulary` slots and cut at `length`; `limit` keeps every n-th review, for quick trials."""

    layers: int = 2
    d_model: int = 64
    heads: int = 4
    length: int = 192
    vocabulary: int = 16_384
    dropout: float = 0.1
    limit: int | None = None

    def build_model(self) -> nn.Module:
        return ReviewEncoder(self.vocabulary, self.length, self.layers, self.d_model, self.heads, self.dropout)

    def train_data(self) -> Reviews:
        return self._reviews("train.csv.xz")

    def eval_data(self) -> Reviews:
        return self._reviews("test.csv.xz")

    def collate(self, samples: Sequence[tuple[list[int], int]]) -> Batch:
        """(int64 (batch, longest) padded with 0, int64 labels (batch,))."""
        tokens = [torch.tensor(words) for words, _ in samples]
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=_PADDING)
        return padded, torch.tensor([label for _, label in samples])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        tokens, labels = batch
        return nn.functional.cross_entropy(model(tokens), labels, reduction="sum"), float(len(labels))

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor | float]:
        """Counts of the four outcomes, which add; accuracy and F1 do not."""
        tokens, labels = batch
        said = model(tokens).argmax(-1)
        return {
            "true_positive": ((said == 1) & (labels == 1)).sum(),
            "true_negative": ((said == 0) & (labels == 0)).sum(),
            "false_positive": ((said == 1) & (labels == 0)).sum(),
            "false_negative": ((said == 0) & (labels == 1)).sum(),
        }

    def finalise(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        hits, right_no = float(statistics["true_positive"]), float(statistics["true_negative"])
        wrong = float(statistics["false_positive"] + statistics["false_negative"])
        f1 = 2 * hits / (2 * hits + wrong) if hits else 0.0
        return {"accuracy": (hits + right_no) / (hits + right_no + wrong), "f1": f1}

    def _reviews(self, name: str) -> Reviews:
        rows = read_reviews(Path(self.data_uri) / name)
        if self.limit is not None:
            # The file has all negative reviews first: a stride keeps both kinds.
            rows = rows[:: max(1, len(rows) // self.limit)][: self.limit]
        return Reviews(rows, self.vocabulary, self.length)


@dataclass(frozen=True)
class Reviews:
    """Samples (word numbers, label), hashed when asked for."""

    rows: Sequence[tuple[str, int]]
    vocabulary: int
    length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        text, label = self.rows[index]
        return hash_words(text, self.vocabulary, self.length), label


def hash_words(text: str, vocabulary: int, length: int) -> list[int]:
    """The first `length` words as numbers in 1..vocabulary-1 (0 is padding); never empty."""
    words = _WORD.findall(text.lower().replace("<br />", " "))[:length] or [""]
    return [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in words]


@cache
def read_reviews(path: Path) -> list[tuple[str, int]]:
    """(text, label) of every row. Raises DataError when the file is missing, damaged or of another form."""
    try:
        with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
            return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (KeyError, ValueError, csv.Error) as error:
        raise DataError(f"{path} does not have rows of text,label: {error!r}") from error


class ReviewEncoder(nn.Module):
    """Mean of an encoder's outputs over the words, then two logits: int64 (batch, words) -> float32 (batch, 2)."""

    def __init__(self, vocabulary: int, length: int, layers: int, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, d_model)
        self.positions = nn.Embedding(length, d_model)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            d_model, heads, 4 * d_model, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        # Nested tensors would make the arithmetic depend on what else is in the batch.
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == _PADDING
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.norm(self.encoder(x, src_key_padding_mask=padding))
        kept = (~padding).to(x.dtype)[:, :, None]
        return self.head((x * kept).sum(1) / kept.sum(1))  # type: ignore[no-any-return]
