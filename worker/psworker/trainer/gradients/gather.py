"""From the gradients of a bucket's tensors to the words that one partition gets: gathered, or written to a lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pscluster.step.codec import as_bytes
from pscluster.step.layout import Layout, Span
from pscluster.wire.frame import Buffer

Gradients = list[torch.Tensor | None]  # of a bucket's tensors in order; None: no microbatch of the node touched it
Pieces = list[tuple[int, int, torch.Tensor]]  # start word, stop word, words; what lies between is zeros


def gather(layout: Layout, bucket: int, gradients: Sequence[torch.Tensor | None]) -> Pieces:
    """Each gradient in its bucket, flat; the tensors share the gradients' memory where they are contiguous."""
    pieces = []
    for placed, gradient in zip(layout.buckets[bucket].placed, gradients, strict=True):
        if gradient is not None and gradient.numel():
            flat = gradient.detach().contiguous().reshape(-1)
            pieces.append((placed.offset, placed.offset + flat.numel(), flat))
    return pieces


def cut(pieces: Pieces, span: Span, item_bytes: int) -> list[Buffer]:
    """The span's words as buffers to send one after the other. They share the pieces' memory."""
    found: list[Buffer] = []
    at = span.start
    for low, high, words in _within(pieces, span):
        if low > at:
            found.append(bytes(item_bytes * (low - at)))
        found.append(as_bytes(words))
        at = high
    if span.stop > at:
        found.append(bytes(item_bytes * (span.stop - at)))
    return found


Copy = Callable[[torch.Tensor, torch.Tensor], object]  # source, target


def write(pieces: Pieces, span: Span, target: torch.Tensor, copy: Copy) -> None:
    """Copy the span's words to `target`, which is as long as the span and may hold anything before."""
    at = span.start
    for low, high, words in _within(pieces, span):
        if low > at:
            target[at - span.start : low - span.start].zero_()
        copy(words, target[low - span.start : high - span.start])
        at = high
    if span.stop > at:
        target[at - span.start :].zero_()


def _within(pieces: Pieces, span: Span) -> Pieces:
    """The parts of the pieces that lie in the span, in order."""
    found = []
    for first, last, words in pieces:
        low, high = max(first, span.start), min(last, span.stop)
        if low < high:
            found.append((low, high, words[low - first : high - first]))
    return found
