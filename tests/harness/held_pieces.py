"""Snapshot parts written from memory that does not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pscluster.step.layout import Layout
from pscluster.storage import Buffer, Live, Written
from pscluster.storage import snapshot as product
from pscluster.storage.snapshot import Location, PartMeta, PieceKey


class Held:
    """`Pieces` in memory that does not change."""

    def __init__(self, pieces: Mapping[PieceKey, Buffer]) -> None:
        self._pieces = pieces

    def sizes(self) -> Mapping[PieceKey, int]:
        return {key: memoryview(data).nbytes for key, data in self._pieces.items()}

    def chunks(self, key: PieceKey) -> Iterator[Live]:
        yield Live(memoryview(self._pieces[key]), instead=lambda: None)

    def end(self) -> None:
        """Nothing to release."""


def write_part(location: Location, meta: PartMeta, layout: Layout, pieces: Any) -> Written:
    """The product's `write_part`; `pieces` may be a mapping from piece to its words."""
    return product.write_part(location, meta, layout, Held(pieces) if isinstance(pieces, Mapping) else pieces)
