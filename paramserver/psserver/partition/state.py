"""What a partition holds: its spans' values, the optimizer's moments, and how often each tensor was updated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pscluster.errors import StorageError
from pscluster.layout import Layout, Span
from pscluster.snapshot import Buffer, Part, PartMeta, PieceKey, read_part


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous one-dimensional CPU tensor's memory, writable, shared."""
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(bytearray())


@dataclass(kw_only=True)
class PartitionState:
    """`values[b]` and `moments[b]` are fp32 (or raw 4-byte words), one-dimensional, of span b's length.

    `ages[t]`: updates applied to tensor t of the layout; every partition keeps all of them."""

    layout: Layout
    spans: tuple[Span, ...]
    values: list[torch.Tensor]
    moments: list[list[torch.Tensor]]
    ages: list[int]
    filled: set[int] = field(default_factory=set)

    @classmethod
    def empty(cls, layout: Layout, partition: int, num_partitions: int, num_moments: int) -> PartitionState:
        """Memory for everything, touched once, so that no step pays for the first touch."""
        spans = layout.spans(partition, num_partitions)
        kinds = [layout.buckets[span.bucket].kind for span in spans]
        values = [
            torch.zeros(s.num_words, dtype=torch.float32 if k in ("trained", "averaged") else torch.int32)
            for s, k in zip(spans, kinds, strict=True)
        ]
        moments = [
            [torch.zeros(s.num_words) for _ in range(num_moments if k == "trained" else 0)]
            for s, k in zip(spans, kinds, strict=True)
        ]
        return cls(layout=layout, spans=spans, values=values, moments=moments, ages=[0] * len(layout.tensors))

    def reset(self) -> None:
        """Step 0 without values: they come from a trainer, or are zero where there are none."""
        for moments in self.moments:
            for moment in moments:
                moment.zero_()
        self.ages = [0] * len(self.layout.tensors)
        self.filled = set()

    @property
    def is_filled(self) -> bool:
        """Whether every bucket has its first values."""
        return all(span.bucket in self.filled for span in self.spans if span.num_words)

    @property
    def size_bytes(self) -> int:
        """Memory of values and moments."""
        tensors = [*self.values, *(m for per_bucket in self.moments for m in per_bucket)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def load(self, path: Path, partition: int, num_partitions: int, step: int) -> None:
        """Take everything from a snapshot part. Raises StorageError when it is not this partition's or this step's."""
        part = read_part(path)
        self._check(part, path, partition, num_partitions, step)
        for (bucket, what), data in part.pieces.items():
            target = self.values[bucket] if what == "values" else self.moments[bucket][int(what.removeprefix("moment"))]
            as_bytes(target)[:] = data
        self.ages = list(part.meta.ages)
        self.filled = {span.bucket for span in self.spans}

    def pieces(self) -> dict[PieceKey, Buffer]:
        """A private copy of everything, for a snapshot that is written while training goes on."""
        copied: dict[PieceKey, Buffer] = {}
        for span, values, moments in zip(self.spans, self.values, self.moments, strict=True):
            if not span.num_words:
                continue
            copied[(span.bucket, "values")] = bytes(as_bytes(values))
            for number, moment in enumerate(moments):
                copied[(span.bucket, f"moment{number}")] = bytes(as_bytes(moment))
        return copied

    def meta(self, job: str, step: int, generation: int, partition: int, num_partitions: int) -> PartMeta:
        return PartMeta(
            job=job,
            step=step,
            generation=generation,
            partition=partition,
            num_partitions=num_partitions,
            ages=tuple(self.ages),
        )

    def _check(self, part: Part, path: Path, partition: int, num_partitions: int, step: int) -> None:
        meta = part.meta
        if (meta.partition, meta.num_partitions, meta.step) != (partition, num_partitions, step):
            raise StorageError(
                f"{path} holds partition {meta.partition} of {meta.num_partitions} at step {meta.step}, "
                f"not {partition} of {num_partitions} at step {step}"
            )
        if part.layout != self.layout:
            raise StorageError(f"{path} is of another model")
        if set(part.pieces) != set(self._piece_sizes()):
            raise StorageError(f"{path} was written with another optimizer")
        for key, size in self._piece_sizes().items():
            if len(part.pieces[key]) != size:
                raise StorageError(f"{path}: bucket {key[0]} {key[1]} has the wrong length")

    def _piece_sizes(self) -> dict[PieceKey, int]:
        sizes: dict[PieceKey, int] = {}
        for span, moments in zip(self.spans, self.moments, strict=True):
            if span.num_words:
                sizes[(span.bucket, "values")] = span.size_bytes
                sizes |= {(span.bucket, f"moment{n}"): span.size_bytes for n in range(len(moments))}
        return sizes
