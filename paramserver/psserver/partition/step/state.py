"""What a partition holds: its spans' values, the optimizer's moments, and how often each tensor was updated."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass, field

import torch

from pscluster.errors import DamagedError
from pscluster.step.codec import DTYPES, as_bytes
from pscluster.step.layout import WORD_BYTES, BucketKind, Codec, Layout, Span
from pscluster.storage import Buffer
from pscluster.storage.snapshot import Part, PartMeta, PieceKey, read_part
from pscluster.wire.memory import Segment, page_offsets


@dataclass(kw_only=True)
class PartitionState:
    """`values[b]` and `moments[b]` are fp32 (or raw 4-byte words), one-dimensional, of span b's length. Each begins
    with a page, so that a disk can take it from where it lies.

    `published[b]` is what trainers read, in the shared memory of `segment`: with pull codec fp32 the very memory of
    `values[b]`, else the trained ones rounded, set by `publish`.
    `update_counts[t]`: updates applied to tensor t of the layout; every partition keeps all of them."""

    layout: Layout
    spans: tuple[Span, ...]
    segment: Segment
    published: list[torch.Tensor]
    values: list[torch.Tensor]
    moments: list[list[torch.Tensor]]
    update_counts: list[int]
    filled: set[int] = field(default_factory=set)

    @classmethod
    def empty(
        cls, layout: Layout, partition: int, num_partitions: int, num_moments: int, pull_codec: Codec = "fp32"
    ) -> PartitionState:
        """Memory for everything, touched once, so that no step pays for the first touch."""
        spans = layout.spans(partition, num_partitions)
        kinds = [layout.buckets[span.bucket].kind for span in spans]
        offsets, size = page_offsets(layout.wire_bytes(span, pull_codec) for span in spans)
        segment = Segment.create(size, writable_by_others=False)
        published = [
            torch.frombuffer(segment.view, dtype=_dtype(k, pull_codec), offset=at, count=s.num_words)
            if s.num_words
            else torch.zeros(0, dtype=_dtype(k, pull_codec))
            for s, k, at in zip(spans, kinds, offsets, strict=True)
        ]
        values = [
            p if p.dtype == _dtype(k, "fp32") else _zeros(p.numel()) for p, k in zip(published, kinds, strict=True)
        ]
        counts = [num_moments if k == "trained" else 0 for k in kinds]
        offsets, size = page_offsets(s.size_bytes for s, count in zip(spans, counts, strict=True) for _ in range(count))
        memory, places = huge_page_memory(size), iter(offsets)  # of all: few large pages are filled by half
        moments = [
            [_zeros(s.num_words, memory[next(places) :]) for _ in range(count)]
            for s, count in zip(spans, counts, strict=True)
        ]
        return cls(
            layout=layout, spans=spans, segment=segment, published=published, values=values, moments=moments,
            update_counts=[0] * len(layout.tensors),
        )  # fmt: skip

    @property
    def rounds(self) -> bool:
        """Whether what is published of trained buckets is not exact."""
        return any(p is not v for p, v in zip(self.published, self.values, strict=True))

    def publish(self, bucket: int) -> None:
        """The bucket has new values: what trainers read follows."""
        if self.published[bucket] is not self.values[bucket]:
            self.published[bucket].copy_(self.values[bucket])

    def fill(self, bucket: int) -> bool:
        """The bucket has its first values. Whether it was the last one without."""
        was_filled = self.is_filled
        self.publish(bucket)
        self.filled.add(bucket)
        return self.is_filled and not was_filled

    def reset(self) -> None:
        """Step 0 without values: they come from a trainer, or are zero where there are none."""
        for moments in self.moments:
            for moment in moments:
                moment.zero_()
        self.update_counts = [0] * len(self.layout.tensors)
        self.filled = set()

    @property
    def is_filled(self) -> bool:
        """Whether every bucket has its first values."""
        return all(span.bucket in self.filled for span in self.spans if span.num_words)

    @property
    def size_bytes(self) -> int:
        """Memory of values, what is published of them, and moments."""
        rounded = [p for p, v in zip(self.published, self.values, strict=True) if p is not v]
        tensors = [*self.values, *rounded, *(m for per_bucket in self.moments for m in per_bucket)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def load(self, location: str, partition: int, num_partitions: int, step: int) -> None:
        """Take everything from a snapshot part. Raises DamagedError when it is not this partition's or this step's,
        StorageError when it cannot be read."""
        part = read_part(location)
        self._check(part, location, partition, num_partitions, step)
        for key, place in self.places().items():
            place[:] = part.pieces[key]
        for span in self.spans:
            self.publish(span.bucket)
        self.update_counts = list(part.meta.update_counts)
        self.filled = {span.bucket for span in self.spans}

    def places(self) -> dict[PieceKey, memoryview]:
        """The memory of everything, by what it is in a snapshot."""
        found: dict[PieceKey, memoryview] = {}
        for span, values, moments in zip(self.spans, self.values, self.moments, strict=True):
            if span.num_words:
                found[(span.bucket, "values")] = as_bytes(values)
                found |= {(span.bucket, f"moment{number}"): as_bytes(m) for number, m in enumerate(moments)}
        return found

    def pieces(self) -> dict[PieceKey, Buffer]:
        """A private copy of everything, to be sent while training goes on."""
        sources = self.places()
        total = sum(source.nbytes for source in sources.values())
        memory = huge_page_memory(total)
        copied: dict[PieceKey, Buffer] = {}
        for key, source in sources.items():
            memory[: source.nbytes] = source
            copied[key], memory = memory[: source.nbytes], memory[source.nbytes :]
        return copied

    def meta(self, job: str, step: int, generation: int, partition: int, num_partitions: int) -> PartMeta:
        return PartMeta(
            job=job,
            step=step,
            generation=generation,
            partition=partition,
            num_partitions=num_partitions,
            update_counts=tuple(self.update_counts),
        )

    def _check(self, part: Part, where: str, partition: int, num_partitions: int, step: int) -> None:
        meta = part.meta
        if (meta.partition, meta.num_partitions, meta.step) != (partition, num_partitions, step):
            raise DamagedError(
                f"{where} holds partition {meta.partition} of {meta.num_partitions} at step {meta.step}, "
                f"not {partition} of {num_partitions} at step {step}"
            )
        if part.layout != self.layout:
            raise DamagedError(f"{where} is of another model")
        places = self.places()
        if set(part.pieces) != set(places):
            raise DamagedError(f"{where} was written with another optimizer")
        for key, place in places.items():
            if len(part.pieces[key]) != place.nbytes:
                raise DamagedError(f"{where}: bucket {key[0]} {key[1]} has the wrong length")


def _zeros(num_words: int, memory: memoryview | None = None) -> torch.Tensor:
    """At the start of the memory; without one, in private memory that begins with a page."""
    if not num_words:
        return torch.zeros(0)
    if memory is None:
        memory = huge_page_memory(num_words * WORD_BYTES)
    return torch.frombuffer(memory, dtype=torch.float32, count=num_words).zero_()


def _dtype(kind: BucketKind, codec: Codec) -> torch.dtype:
    """Of the words of a bucket of this kind as trainers read them."""
    if kind == "trained":
        return DTYPES[codec]
    return torch.float32 if kind == "averaged" else torch.int32


_HUGE_BYTES = 2 << 20  # a large page of x86-64, and of Arm with pages of 4 KiB; elsewhere one begins there or not


def huge_page_memory(size_bytes: int) -> memoryview:
    """Fresh memory, zeroed, returned to the system when the last reference is gone: the heap would keep it.
    It begins with a page.

    In large pages where the kernel has them: 4 KiB at a time, clearing them takes several times as long as a copy
    (measured: 45 ms for 72 MB, 11 in large ones); a disk takes what lies in them with a third of the work."""
    slack = _HUGE_BYTES if size_bytes >= _HUGE_BYTES else 0
    memory = mmap.mmap(-1, max(size_bytes + slack, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_BYTES if slack else 0
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size_bytes // _HUGE_BYTES * _HUGE_BYTES)
    return memoryview(memory)[start : start + size_bytes]
