"""A snapshot part: one partition's slice of one committed step, as a file. Imports no torch.

    "PSSNAP02" | header length u32 | header JSON | header CRC-32C u32 | the pieces | footer

The header names the job, step, partition, the whole layout, and the bucket, kind (its values or one of its moments) and
length of each piece. The footer is each piece's CRC-32C as u32, then the CRC-32C of these: checksums come last, so that
the writer reads each byte once. Zeros pad each large piece to a multiple of 4096, so that it can be written without a
copy. `pscluster.storage` makes the file appear atomically.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import crc32c

from pscluster.errors import DamagedError, LayoutError, StorageError
from pscluster.step.layout import WORD_BYTES, Layout
from pscluster.storage import Buffer, Live, SnapshotStore, Written, split
from pscluster.storage.direct import ALIGNMENT

_MAGIC = b"PSSNAP02"
_PART_NAME = re.compile(r"step-([0-9]{1,20})\.part-([0-9]{1,20})\.generation-([0-9]{1,20})\.snapshot")
_U32 = struct.Struct("<I")
_MAX_HEADER_BYTES = 256 << 20
_READ_BYTES = 8 << 20
_LARGE_BYTES = 1 << 20

PieceKey = tuple[int, str]  # bucket index; "values", "moment0" or "moment1"
Location = str | Path  # of one file: a path, or a URL
_POLYNOMIAL = 0x82F6_3B78  # Castagnoli's, without x^32
_WORD = 0xFFFF_FFFF
_ONE = 1 << 31
_X8 = 1 << 23


@dataclass(frozen=True, kw_only=True)
class PartMeta:
    """What slice it is. `update_counts`: updates applied to each tensor of the layout."""

    job: str
    step: int
    generation: int
    partition: int
    num_partitions: int
    update_counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part, read and verified. `pieces`: words of each piece, little-endian."""

    meta: PartMeta
    layout: Layout
    pieces: Mapping[PieceKey, bytearray]


class Pieces(Protocol):
    """The source of a part's data, read once, piece by piece."""

    def sizes(self) -> Mapping[PieceKey, int]:
        """The bytes of every piece, in the order in which they are written."""

    def chunks(self, key: PieceKey) -> Iterator[Live]:
        """The piece, in order. A chunk is no longer used when the next is requested, the piece not after the last."""

    def end(self) -> None:
        """No data is needed any more. Safe to repeat."""


def part_name(step: int, partition: int, generation: int) -> str:
    """A part's file name; with the generation, so that an old file is never overwritten or mistaken for a new one."""
    return f"step-{step:010d}.part-{partition:04d}.generation-{generation}.snapshot"


class PartName(NamedTuple):
    """The fields of a part's file name."""

    step: int
    partition: int
    generation: int


def parse_part_name(name: str) -> PartName | None:
    """The inverse of `part_name`; None for any other file's name."""
    match = _PART_NAME.fullmatch(name)
    return PartName(*map(int, match.groups())) if match else None


def write_part(location: Location, meta: PartMeta, layout: Layout, pieces: Pieces, recycled_file: str = "") -> Written:
    """Write a part durably. `recycled_file`: a file set aside in its store, consumed on return. Blocks on the store.
    Raises StorageError, and then leaves nothing behind."""
    store, name = split(location)
    content = _Content(_head(meta, layout, pieces.sizes()), pieces)
    return store.write(
        name, content, size_bytes=content.size_bytes, checksum=content.checksum, recycled_file=recycled_file
    )


def _head(meta: PartMeta, layout: Layout, sizes: Mapping[PieceKey, int]) -> bytes:
    pieces = [{"bucket": bucket, "what": what, "size_bytes": size} for (bucket, what), size in sizes.items()]
    header = json.dumps({"meta": asdict(meta), "layout": layout.to_json().decode(), "pieces": pieces}).encode()
    return _MAGIC + _U32.pack(len(header)) + header + _U32.pack(crc32c.crc32c(header))


class _Content:
    """The bytes of a part, iterated once, and the CRC-32C of what was iterated."""

    def __init__(self, head: bytes, pieces: Pieces) -> None:
        self._head = head
        self._pieces = pieces
        self._checksum = 0
        self.size_bytes = _end(len(head), pieces.sizes().values())

    def checksum(self) -> int:
        return self._checksum

    def __iter__(self) -> Iterator[Buffer | Live]:
        yield self._with(self._head)
        at = len(self._head)
        checksums = bytearray()
        for key, size in self._pieces.sizes().items():
            gap = _gap(at, size)
            yield self._with(bytes(gap))
            at += gap + size
            total = 0
            for chunk in self._pieces.chunks(key):
                total = chunk.read(partial(crc32c.crc32c, value=total))
                yield chunk
            self._checksum = combine_crc32c(self._checksum, total, size)
            checksums += _U32.pack(total)
        yield self._with(checksums + _U32.pack(crc32c.crc32c(checksums)))

    def _with(self, data: Buffer) -> Buffer:
        self._checksum = crc32c.crc32c(data, self._checksum)
        return data


def _gap(at: int, size: int) -> int:
    """The padding between offset `at` and a piece of that size."""
    return -at % ALIGNMENT if size >= _LARGE_BYTES else 0


def _end(at: int, sizes: Collection[int]) -> int:
    """The length of a part whose pieces begin at or after offset `at`."""
    for size in sizes:
        at += _gap(at, size) + size
    return at + _U32.size * (len(sizes) + 1)


def read_part(location: Location) -> Part:
    """Read and verify a part. Raises DamagedError naming the file if it is missing, torn or changed, and StorageError
    when it cannot be read."""
    store, name = split(location)
    with store.reading(name) as file:
        try:
            return _read(file)
        except (AttributeError, KeyError, TypeError, ValueError, struct.error, LayoutError) as error:
            raise DamagedError(f"{location} is not a snapshot part, or is torn: {error!r}") from None


def verify_file(store: SnapshotStore, name: str, size_bytes: int, checksum: str) -> None:
    """Read a whole file and compare its size and checksum. Raises DamagedError, StorageError."""
    size = total = 0
    with store.reading(name) as file:
        while data := file.read(_READ_BYTES):
            size += len(data)
            total = crc32c.crc32c(data, total)
    if (size, f"crc32c:{total:08x}") != (size_bytes, checksum):
        raise DamagedError(f"{store.location}/{name} is not what was written: {size} bytes, crc32c:{total:08x}")


def read_parts(paths: Sequence[Location]) -> tuple[Layout, list[bytearray]]:
    """The layout, and each bucket's words, from all parts of one snapshot. Raises StorageError when a part is missing,
    of another step, or torn."""
    parts = [read_part(path) for path in paths]
    if not parts:
        raise StorageError("a snapshot without parts cannot be read")
    layout, first = parts[0].layout, parts[0].meta
    seen = sorted(part.meta.partition for part in parts)
    if seen != list(range(first.num_partitions)):
        raise StorageError(f"a snapshot needs parts 0 to {first.num_partitions - 1}; there are {seen}")
    if any(part.meta.step != first.step or part.layout != layout for part in parts):
        raise StorageError("the parts of a snapshot are not of one step and one model")
    words = [bytearray(bucket.num_words * WORD_BYTES) for bucket in layout.buckets]
    for part in parts:
        for span in layout.spans(part.meta.partition, first.num_partitions):
            data = part.pieces.get((span.bucket, "values"), b"")
            if len(data) != span.size_bytes:
                raise StorageError(f"part {part.meta.partition} has {len(data)} bytes of bucket {span.bucket}")
            words[span.bucket][span.start * WORD_BYTES : span.stop * WORD_BYTES] = data
    return layout, words


def _read(file: Any) -> Part:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("no magic number")
    (length,) = _U32.unpack(file.read(_U32.size))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    raw = file.read(length)
    if _U32.unpack(file.read(_U32.size))[0] != crc32c.crc32c(raw):
        raise ValueError("the header does not match its checksum")
    header = json.loads(raw)
    meta = header["meta"]
    counts = meta.pop("ages") if "ages" in meta else meta["update_counts"]  # the name in version 0.1
    meta["update_counts"] = tuple(counts)
    pieces = _read_pieces(file, header["pieces"])
    return Part(meta=PartMeta(**meta), layout=Layout.from_json(header["layout"].encode()), pieces=pieces)


def _read_pieces(file: Any, index: Sequence[Mapping[str, Any]]) -> dict[PieceKey, bytearray]:
    """Read the pieces after the header; allocate nothing that the file is too short to fill."""
    at = file.tell()
    sizes = [entry["size_bytes"] for entry in index]
    left = file.seek(0, 2) - _end(at, sizes)
    if left or min(sizes, default=0) < 0:
        raise ValueError(f"{left:+} bytes compared with the header")
    file.seek(at)
    pieces = {}
    checksums = bytearray()
    for entry, size in zip(index, sizes, strict=True):
        gap = _gap(at, size)
        pieces[(entry["bucket"], entry["what"])] = data = bytearray(size)
        if any(file.read(gap)) or file.readinto(data) != size:
            raise ValueError("the pieces do not match the header")
        checksums += _U32.pack(crc32c.crc32c(data))
        at += gap + size
    if file.read() != checksums + _U32.pack(crc32c.crc32c(checksums)):
        raise ValueError("a piece does not match its checksum")
    return pieces


def combine_crc32c(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32C of two byte strings in sequence, from that of each and the length of the second. A CRC is a remainder
    of polynomials over GF(2), whose coefficients are bits, that of x^0 the highest of 32; appending n bytes multiplies
    by x^(8n)."""
    return _times(_shift(second_bytes), first) ^ second


@lru_cache(maxsize=1024)
def _shift(num_bytes: int) -> int:
    """x^(8 num_bytes), by squaring."""
    power, square = _ONE, _X8
    while num_bytes:
        if num_bytes & 1:
            power = _times(power, square)
        square = _times(square, square)
        num_bytes >>= 1
    return power


def _times(left: int, right: int) -> int:
    """The product modulo the polynomial."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = left << 1 & _WORD
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product
