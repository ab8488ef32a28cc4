"""Digests of one microbatch's gradient and buffers, tensor by tensor, for an audit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pscluster.step.codec import as_bytes
from pscluster.step.layout import Layout
from pscluster.wire.frame import checksum
from psworker.replica import Replica

_ABSENT = checksum([b"absent"])  # of a tensor that backward did not touch


class TensorDigests:
    """`found`: CRC-32C by number of the tensor. It detects every change of up to 32 neighbouring bits."""

    def __init__(self, layout: Layout) -> None:
        self.found: dict[int, int] = {}
        self._layout = layout

    def take_gradients(self, bucket: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """The gradients of a bucket's tensors, in order, as they are now. Waits for the device."""
        for placed, gradient in zip(self._layout.buckets[bucket].placed, gradients, strict=True):
            self.found[placed.tensor] = _ABSENT if gradient is None else _digest(gradient)

    def take_buffers(self, replica: Replica, weight: float) -> None:
        """The live buffers, as this microbatch left them."""
        for bucket in self._layout.buckets:
            if bucket.kind not in ("averaged", "carried"):
                continue
            averaged = bucket.kind == "averaged"
            words = (
                replica.buffers.weighted(bucket.index, weight) if averaged else replica.buffers.carried(bucket.index)
            )
            for placed in bucket.placed:
                num_words = self._layout.tensors[placed.tensor].num_words
                self.found[placed.tensor] = _digest(words[placed.offset : placed.offset + num_words])


def _digest(tensor: torch.Tensor) -> int:
    return checksum([as_bytes(tensor.detach().contiguous().reshape(-1).cpu())])
