"""The memory of a replica: the words of every bucket, private or windows onto what a partition on this host holds."""

from __future__ import annotations

import torch

from pscluster.step.layout import WORD_BYTES, Layout, Span
from pscluster.wire.memory import Arena, Segment, page_offsets


class BucketMemory:
    """`flats[b]` is bucket b: fp32 for trained and averaged buckets, int32 words for the raw ones.

    A span of it may become a window onto a partition's segment. Then it holds whatever the partition holds, now and
    later, and must not be written; the tensors over it stay valid either way. Partitions begin on block boundaries,
    which are page boundaries."""

    def __init__(self, layout: Layout, *, windows: bool = True) -> None:
        """`windows=False`: there are none, so that the pages stay the same ones for good."""
        self.may_window = windows
        self._layout = layout
        self._offsets, size = page_offsets(b.num_words * WORD_BYTES for b in layout.buckets)
        self._arena = Arena(size)
        self._windows: dict[tuple[int, int], Segment] = {}  # bucket, first word of the span
        self.flats = [
            torch.frombuffer(self._arena.view, dtype=_dtype(b.kind), offset=at, count=b.num_words)
            for b, at in zip(layout.buckets, self._offsets, strict=True)
        ]

    def words(self, span: Span) -> torch.Tensor:
        """The words of a span, as they are."""
        return self.flats[span.bucket][span.start : span.stop]

    def writable(self, span: Span) -> torch.Tensor:
        """The words of a span, in memory of this process; a window there is closed first, its content gone."""
        if self._windows.pop((span.bucket, span.start), None) is not None:
            self._arena.make_private(self._offset(span), span.size_bytes)
        return self.words(span)

    def show(self, span: Span, segment: Segment, segment_offset: int) -> None:
        """Make a span a window onto the segment, from `segment_offset` on. Only where windows may be."""
        assert self.may_window
        if self._windows.get((span.bucket, span.start)) is not segment:
            self._arena.show(self._offset(span), segment, segment_offset, span.size_bytes)
            self._windows[(span.bucket, span.start)] = segment

    def close_windows(self) -> None:
        """Make all memory private again, if there are windows; it is zeroed then."""
        if not self._windows:
            return
        self._windows.clear()
        for bucket, offset in zip(self._layout.buckets, self._offsets, strict=True):
            self._arena.make_private(offset, bucket.num_words * WORD_BYTES)

    def _offset(self, span: Span) -> int:
        return self._offsets[span.bucket] + span.start * WORD_BYTES


def _dtype(kind: str) -> torch.dtype:
    return torch.float32 if kind in ("trained", "averaged") else torch.int32
