"""A snapshot part: one partition's slice of one committed step, as a file. Free of torch.

    "PSSNAP01" | header length u32 | header JSON | header CRC-32C u32 | the pieces, one after the other

The header names the job, step, partition, the whole layout, and for each piece (a bucket's values or one of its
moments) its place, length and CRC-32C. A file is written aside, synced and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import crc32c

from pscluster.errors import LayoutError, StorageError
from pscluster.layout import WORD_BYTES, Layout

_MAGIC = b"PSSNAP01"
_U32 = struct.Struct("<I")
_MAX_HEADER_BYTES = 256 << 20

PieceKey = tuple[int, str]  # bucket index; "values", "moment0" or "moment1"
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, kw_only=True)
class PartMeta:
    """Whose slice it is. `ages`: updates applied to each tensor of the layout."""

    job: str
    step: int
    generation: int
    partition: int
    num_partitions: int
    ages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part as read and verified. `pieces`: words of each piece, little-endian."""

    meta: PartMeta
    layout: Layout
    pieces: Mapping[PieceKey, bytearray]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the catalogue keeps of a part. `checksum`: "crc32c:<8 hex digits>" over the file."""

    path: Path
    size_bytes: int
    checksum: str


def part_name(step: int, partition: int, generation: int) -> str:
    """A part's file name; the generation is in it, so that a file of the past is never overwritten or mistaken."""
    return f"step-{step:010d}.part-{partition:04d}.generation-{generation}.snapshot"


def write_part(path: Path, meta: PartMeta, layout: Layout, pieces: Mapping[PieceKey, Buffer]) -> Written:
    """Write a part durably. Blocks on the disk. Raises StorageError, and then leaves nothing behind."""
    index = [
        {"bucket": bucket, "what": what, "size_bytes": memoryview(data).nbytes, "crc32c": crc32c.crc32c(data)}
        for (bucket, what), data in pieces.items()
    ]
    header = json.dumps({"meta": asdict(meta), "layout": layout.to_json().decode(), "pieces": index}).encode()
    head = _MAGIC + _U32.pack(len(header)) + header + _U32.pack(crc32c.crc32c(header))
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size, total = _write_durably(temporary, [head, *pieces.values()])
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # where it could not be made, it cannot be removed either
            temporary.unlink(missing_ok=True)
        raise _storage_error(error, f"cannot write the snapshot {path}") from None
    return Written(path=path, size_bytes=size, checksum=f"crc32c:{total:08x}")


def read_part(path: Path) -> Part:
    """Read and verify a part. Raises StorageError naming the file for whatever is missing, torn or changed."""
    try:
        with path.open("rb") as file:
            return _read(file)
    except OSError as error:
        raise _storage_error(error, f"cannot read the snapshot {path}") from None
    except (AttributeError, KeyError, TypeError, ValueError, struct.error, LayoutError) as error:
        raise StorageError(f"{path} is no snapshot part, or is torn: {error!r}") from None


def read_parts(paths: Sequence[Path]) -> tuple[Layout, list[bytearray]]:
    """The whole model's values from all parts of one snapshot: the layout, and each bucket's words.

    Raises StorageError when a part is missing, of another step, or torn."""
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


def _write_durably(path: Path, buffers: Sequence[Buffer]) -> tuple[int, int]:
    size = total = 0
    with path.open("wb", buffering=0) as file:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            size += view.nbytes
            total = crc32c.crc32c(view, total)
            while view.nbytes:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return size, total


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(file: Any) -> Part:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("no magic number")
    (length,) = _U32.unpack(file.read(_U32.size))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    raw = file.read(length)
    if _U32.unpack(file.read(_U32.size))[0] != crc32c.crc32c(raw):
        raise ValueError("the header does not fit its checksum")
    header = json.loads(raw)
    meta = header["meta"]
    meta["ages"] = tuple(meta["ages"])
    left = os.fstat(file.fileno()).st_size - file.tell()
    pieces: dict[PieceKey, bytearray] = {}
    for entry in header["pieces"]:
        size = entry["size_bytes"]
        left -= size
        if size < 0 or left < 0:
            raise ValueError("shorter than its header says")
        data = bytearray(size)
        if file.readinto(data) != size or crc32c.crc32c(data) != entry["crc32c"]:
            raise ValueError(f"bucket {entry['bucket']} {entry['what']} does not fit its checksum")
        pieces[(entry["bucket"], entry["what"])] = data
    if left:
        raise ValueError(f"{left} bytes too many")
    return Part(meta=PartMeta(**meta), layout=Layout.from_json(header["layout"].encode()), pieces=pieces)


def _storage_error(error: OSError, what: str) -> StorageError:
    action = "free space and submit or resume again" if error.errno == errno.ENOSPC else ""
    return StorageError(f"{what}: {error.strerror or error}", action=action, details={"errno": str(error.errno)})
