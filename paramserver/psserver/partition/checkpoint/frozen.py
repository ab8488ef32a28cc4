"""What a partition holds at one version, for a snapshot: not copied unless it is overwritten before it is written.

Between two updates lie a forward and a backward, in which most of a snapshot goes to the disk from where it lies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial

from pscluster.storage import Buffer, Live
from pscluster.storage.snapshot import PieceKey
from psserver.partition.step.state import huge_page_memory

CHUNK_BYTES = 4 << 20
"""The unit of a write, repeated when the memory was overwritten during it."""


class Frozen:
    """Made, and warned of what is about to change, by the partition's thread; read by the one that writes (`Pieces`).

    Neither waits for the other longer than a copy takes, however slow the disk is. `places`: the memory of every piece,
    which the partition goes on updating."""

    def __init__(self, places: Mapping[PieceKey, memoryview]) -> None:
        self._lock = threading.Lock()
        self._sources = {key: memoryview(place).cast("B") for key, place in places.items()}
        self._sizes = {key: source.nbytes for key, source in self._sources.items()}
        self._live = set(self._sources)  # what still lies in the partition's memory

    @property
    def is_over(self) -> bool:
        """Nothing of it is needed any more."""
        return not self._sources

    # ---- the partition's thread ----

    def preserve(self, bucket: int) -> None:
        """The bucket is about to be overwritten: copy what of it was not written yet."""
        with self._lock:
            for key in [key for key in self._sizes if key[0] == bucket and key in self._live]:
                self._live.discard(key)
                self._sources[key] = _copied(self._sources[key])

    def preserve_all(self) -> None:
        """Everything is about to be overwritten."""
        for bucket in sorted({bucket for bucket, _ in self._sizes}):
            self.preserve(bucket)

    # ---- the writing thread ----

    def sizes(self) -> Mapping[PieceKey, int]:
        return self._sizes

    def chunks(self, key: PieceKey) -> Iterator[Live]:
        for at in range(0, self._sizes[key], CHUNK_BYTES):
            with self._lock:
                memory = self._sources[key][at : at + CHUNK_BYTES]
                instead = partial(self._instead, key, at) if key in self._live else _nothing
            yield Live(memory, instead)
        self._drop(key)

    def _instead(self, key: PieceKey, at: int) -> Buffer | None:
        with self._lock:
            return None if key in self._live else self._sources[key][at : at + CHUNK_BYTES]

    def end(self) -> None:
        for key in list(self._sizes):
            self._drop(key)

    def _drop(self, key: PieceKey) -> None:
        with self._lock:
            self._live.discard(key)
            self._sources.pop(key, None)


def _nothing() -> None:
    """A copy is never overwritten."""


def _copied(source: memoryview) -> memoryview:
    copied = huge_page_memory(source.nbytes)
    copied[:] = source
    return copied
