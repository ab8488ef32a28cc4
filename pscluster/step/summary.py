"""The small values that are summed in the gradient tree beside the gradients, in float64. Imports no torch.

A step's summary: loss, weight, samples, and which tensors a microbatch touched. An evaluation's statistics: a vector
of sums. Both are added left + right in the order of the tree, in any process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pscluster.errors import FrameError

_NUMBERS = struct.Struct("<ddd")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The summary of one node of a step's tree. `touched`: one bit a tensor of the layout, lowest bit first."""

    loss_sum: float
    weight: float
    samples: float
    touched: bytes

    def pack(self) -> bytes:
        return _NUMBERS.pack(self.loss_sum, self.weight, self.samples) + self.touched

    @classmethod
    def unpack(cls, data: bytes | memoryview, num_tensors: int) -> Summary:
        """The inverse of `pack`. Raises FrameError for a wrong length."""
        if len(data) != summary_bytes(num_tensors):
            raise FrameError(f"a summary of {len(data)} bytes for {num_tensors} tensors", details={"field": "length"})
        loss_sum, weight, samples = _NUMBERS.unpack_from(data)
        return cls(loss_sum=loss_sum, weight=weight, samples=samples, touched=bytes(data[_NUMBERS.size :]))

    def plus(self, right: Summary) -> Summary:
        """The parent of this node and its right sibling."""
        return Summary(
            loss_sum=self.loss_sum + right.loss_sum,
            weight=self.weight + right.weight,
            samples=self.samples + right.samples,
            touched=bytes(a | b for a, b in zip(self.touched, right.touched, strict=True)),
        )

    def is_touched(self, tensor: int) -> bool:
        return bool(self.touched[tensor >> 3] >> (tensor & 7) & 1)


def summary_bytes(num_tensors: int) -> int:
    """Length of a packed summary."""
    return _NUMBERS.size + -(-num_tensors // 8)


def touched_bits(tensors: Iterable[int], num_tensors: int) -> bytes:
    """The bits of `Summary.touched` for the numbers of the touched tensors."""
    bits = bytearray(-(-num_tensors // 8))
    for tensor in tensors:
        bits[tensor >> 3] |= 1 << (tensor & 7)
    return bytes(bits)


Statistics = NDArray[np.float64]


def add_statistics(left: Statistics, right: Statistics) -> Statistics:
    """The parent of two nodes of an evaluation. An empty vector (a shard without a batch) adds nothing.

    Raises FrameError when two vectors differ in length: the task's statistics must not change their shape."""
    if not left.size or not right.size:
        return left if left.size else right
    if left.shape != right.shape:
        raise FrameError(f"evaluation statistics of {left.size} and {right.size} numbers do not add")
    return left + right
