"""How nodes of the gradient tree are represented and added, in every process: part of the job's numerics.

With push codec bf16 every node of a trained bucket, leaves included, is a bf16 tensor: rounded to nearest even where it
is computed, whether or not it is sent. Adding two of them rounds their exact fp32 sum once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pscluster.step.layout import Codec

DTYPES: dict[Codec, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class BufferNode:
    """A node of an averaged bucket: fp32 words (weight * value, summed), or None while no microbatch moved a buffer;
    only then `weight` (float64) is needed."""

    weight: float
    words: torch.Tensor | None

    def plus(self, right: BufferNode, committed: torch.Tensor) -> BufferNode:
        """The parent of this node and `right`; reuses this node's memory.

        Unchanged + unchanged is unchanged, the weights added; otherwise the unchanged side becomes weight * committed
        value. This depends on the tree alone, not on where two nodes are added."""
        weight = self.weight + right.weight
        if self.words is None and right.words is None:
            return BufferNode(weight, None)
        left_words = committed * self.weight if self.words is None else self.words
        right_words = committed * right.weight if right.words is None else right.words
        return BufferNode(weight, left_words.add_(right_words))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous one-dimensional CPU tensor's memory, shared."""
    return tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())


def add_optional(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    """left + right, in left's memory; None stands for zeros.

    x + 0.0 turns -0.0 into 0.0, as required: another process may add the same nodes as words, with real zeros."""
    if left is not None and right is not None:
        return left.add_(right)
    only = left if left is not None else right
    return None if only is None else only.add_(0.0)
