"""Code bundles on the master's disk, named by their content. Everything here blocks on the disk."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pscluster.errors import BundleError, NotFoundError, StorageError
from pscluster.job.bundle import CAP_BYTES

CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".upload-"


class BundleShelf:
    """The directory of bundles. A file in it is whole and verified; half an upload never has a bundle's name."""

    def __init__(self, directory: Path) -> None:
        """Create the directory and remove what broken uploads left. Raises StorageError."""
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(_TEMPORARY + "*"):
                leftover.unlink()
        except OSError as error:
            raise StorageError(f"cannot use {directory}: {error.strerror}") from None

    def has(self, sha256: str) -> bool:
        return _DIGEST.fullmatch(sha256) is not None and self._path(sha256).exists()

    def begin(self, sha256: str, size_bytes: int) -> Upload:
        """Start an upload. Raises BundleError for what is no digest or too long, StorageError."""
        if _DIGEST.fullmatch(sha256) is None:
            raise BundleError(f"{sha256[:80]!r} is not a sha256 digest")
        if size_bytes > CAP_BYTES:
            raise BundleError(f"the bundle has {size_bytes} bytes; at most {CAP_BYTES} are taken")
        return Upload(self._directory, self._path(sha256), sha256, size_bytes)

    def chunks(self, sha256: str) -> Iterator[bytes]:
        """The bundle in pieces of at most 1 MiB. Raises NotFoundError."""
        if not self.has(sha256):
            raise NotFoundError(f"there is no bundle {sha256[:80]!r}", action="submit the job again")
        with self._path(sha256).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def remove(self, sha256: str) -> None:
        """Safe to repeat."""
        if _DIGEST.fullmatch(sha256) is not None:
            self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return bundle_file(self._directory, sha256)


class Upload:
    """One upload. `commit` or `abort` it."""

    def __init__(self, directory: Path, target: Path, sha256: str, size_bytes: int) -> None:
        self._target = target
        self._sha256 = sha256
        self._size_bytes = size_bytes
        self._received = 0
        self._digest = hashlib.sha256()
        try:
            handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=directory)
        except OSError as error:
            raise StorageError(f"cannot store a bundle in {directory}: {error.strerror}") from None
        self._path = Path(name)
        self._file: BinaryIO = os.fdopen(handle, "wb")

    def add(self, data: bytes) -> None:
        """Take the next chunk. Raises BundleError when there is more than was announced, StorageError."""
        self._received += len(data)
        if self._received > self._size_bytes:
            raise BundleError(f"the bundle is longer than the {self._size_bytes} bytes announced")
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise StorageError(f"cannot store the bundle: {error.strerror}") from None

    def commit(self) -> int:
        """Verify, make durable and publish; its length. Raises BundleError for other content than its name says."""
        if self._received != self._size_bytes or self._digest.hexdigest() != self._sha256:
            raise BundleError("the bundle arrived damaged: its content is not what its digest says")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._path.replace(self._target)
            sync_directory(self._target.parent)
        except OSError as error:
            raise StorageError(f"cannot store the bundle: {error.strerror}") from None
        return self._received

    def abort(self) -> None:
        """Leave nothing behind. Safe to repeat, and after `commit`."""
        try:
            self._file.close()
        finally:
            self._path.unlink(missing_ok=True)


def bundle_file(shelf: Path, sha256: str) -> Path:
    """Where the shelf at a directory has a bundle."""
    return shelf / f"{sha256}.tar.gz"


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
