"""A small decoder-only Transformer: pre-norm, tied embeddings, no biases in its matrices, and token shift.

Token shift (Peng, RWKV) hands half of each layer's input channels on from the position before. A byte model then
learns what trigrams know within a few hundred steps instead of a few thousand."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class GPT(nn.Module):
    """Next-token logits: int64 tokens (batch, time <= context) -> float32 (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, layers: int, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"d_model {d_model} is not divisible by heads {heads}")
        self.context = context
        self.tokens = nn.Embedding(vocabulary, d_model)
        self.positions = nn.Embedding(context, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self._initialise(layers)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _initialise(self, layers: int) -> None:
        """Normal with standard deviation 0.02; what adds to the residual stream is scaled down by depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("project.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer four times as wide, each added to the residual stream."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.project = nn.Linear(d_model, d_model, bias=False)
        self.feed_norm = nn.LayerNorm(d_model)
        self.wide = nn.Linear(d_model, 4 * d_model, bias=False)
        self.narrow = nn.Linear(4 * d_model, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            self.qkv(shift_half(self.attention_norm(x))).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(attended.transpose(1, 2).reshape(batch, time, width)))
        out: Tensor = x + self.dropout(self.narrow(functional.gelu(self.wide(shift_half(self.feed_norm(x))))))
        return out


def shift_half(x: Tensor) -> Tensor:
    """(batch, time, width), the upper half of the channels taken from one position earlier (zeros before the first)."""
    kept, shifted = x.chunk(2, dim=-1)
    return torch.cat((kept, functional.pad(shifted, (0, 0, 1, -1))), dim=-1)


@torch.no_grad()
def continue_tokens(
    model: nn.Module, tokens: list[int], context: int, count: int, temperature: float, seed: int
) -> list[int]:
    """`tokens` (not empty) and `count` more, sampled one by one. temperature 0 takes the likeliest.

    Pure in its arguments; puts the model into eval mode."""
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    for _ in range(count):
        window = torch.tensor([tokens[-context:]], device=device)
        logits = model(window)[0, -1].float().cpu()
        if temperature <= 0:
            tokens.append(int(logits.argmax()))
            continue
        odds = functional.softmax(logits / temperature, dim=-1)
        tokens.append(int(torch.multinomial(odds, 1, generator=generator)))
    return tokens
