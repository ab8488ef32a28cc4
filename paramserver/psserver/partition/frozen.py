"""What a partition holds at one version, for a snapshot: not copied unless it is overwritten before it is written.

Between two updates lie a forward and a backward, in which most of a snapshot can be written from where it lies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from pscluster.snapshot import PieceKey
from psserver.partition.private import private_memory

CHUNK_BYTES = 1 << 20
"""What is read at a time, while the partition's thread would have to wait: about a tenth of a millisecond."""
RING_CHUNKS = 16
"""Chunks are copied to these places in turn. Another core that took a chunk to a virtual disk may have it in its cache,
and to overwrite it then is slow (measured: 32 ms for 72 MB through 1 place, 6 through 16)."""


class Frozen:
    """Made, and told of what is about to change, by the partition's thread; read by the one that writes (`Pieces`).

    `places`: the memory of every piece, of which the partition goes on making newer versions."""

    def __init__(self, places: Mapping[PieceKey, memoryview]) -> None:
        self._lock = threading.Lock()
        self._sources = {key: memoryview(place).cast("B") for key, place in places.items()}
        self._sizes = {key: source.nbytes for key, source in self._sources.items()}
        self._live = set(self._sources)  # what still lies in the partition's memory
        self._ring = private_memory(min(RING_CHUNKS * CHUNK_BYTES, sum(self._sizes.values())))
        self._turn = 0

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

    def chunks(self, key: PieceKey) -> Iterator[memoryview]:
        for at in range(0, self._sizes[key], CHUNK_BYTES):
            with self._lock:
                chunk = self._sources[key][at : at + CHUNK_BYTES]
                if key in self._live:
                    chunk, part = self._place(chunk.nbytes), chunk
                    chunk[:] = part
            yield chunk
        self._drop(key)

    def _place(self, size: int) -> memoryview:
        """Room for a chunk, until `RING_CHUNKS` later."""
        begin = self._turn * CHUNK_BYTES
        if begin + size > self._ring.nbytes:
            begin = self._turn = 0
        self._turn += 1
        return self._ring[begin : begin + size]

    def end(self) -> None:
        for key in list(self._sizes):
            self._drop(key)

    def _drop(self, key: PieceKey) -> None:
        with self._lock:
            self._live.discard(key)
            self._sources.pop(key, None)


def _copied(source: memoryview) -> memoryview:
    copied = private_memory(source.nbytes)
    copied[:] = source
    return copied
