"""Snapshots in an object store, through fsspec. A put is atomic: a multi-part upload exists once it is completed.

Credentials, region and endpoint come from where the AWS tools take them: the daemons' environment and ~/.aws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import crc32c

from pscluster.errors import DamagedError, StorageError
from pscluster.storage import Buffer, Live, SnapshotStore, Written

MIN_UPLOAD_BYTES = 16 << 20  # of one part of a multi-part upload
MAX_UPLOAD_PARTS = 9_000  # S3 takes 10,000
_PIECE_BYTES = 4 << 20
_READ_BYTES = 8 << 20
# Every request ends after these timeouts and retries. The partition continues meanwhile.
_CLIENT = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 3, "mode": "standard"}}


def s3_file_system(location: str) -> Any:
    """The client for s3:// URLs. Raises StorageError when s3fs is not installed."""
    try:
        from s3fs.core import S3FileSystem
    except ImportError as error:
        raise StorageError(
            f"{location} needs a client that is not installed here: {error}", action="pip install 'pscluster[s3]'"
        ) from None
    # Other processes write, too: a cached listing is outdated.
    return S3FileSystem(config_kwargs=_CLIENT, use_listings_cache=False)


class ObjectStore(SnapshotStore):
    """`fs` is an fsspec file system whose files take `autocommit=False`."""

    def __init__(self, location: str, fs: Any) -> None:
        self.location = location.rstrip("/")
        self._fs = fs
        self._root = self.location.partition("://")[2]

    def write(
        self,
        name: str,
        buffers: Iterable[Buffer | Live],
        *,
        size_bytes: int | None = None,
        checksum: Callable[[], int] | None = None,
        recycled_file: str = "",  # noqa: ARG002 - not supported
    ) -> Written:
        path = f"{self._root}/{name}"
        settled: Iterable[Buffer] = (buffer.read(bytes) if isinstance(buffer, Live) else buffer for buffer in buffers)
        if size_bytes is None:
            settled = list(settled)
            size_bytes = sum(memoryview(buffer).nbytes for buffer in settled)
        size = total = 0
        with self._named("write", name):
            with self._upload(path, size_bytes) as file:
                for buffer in settled:
                    view = memoryview(buffer).cast("B")
                    size += view.nbytes
                    if checksum is None:
                        total = crc32c.crc32c(view, total)
                    for at in range(0, view.nbytes, _PIECE_BYTES):
                        file.write(view[at : at + _PIECE_BYTES])
            stored = self._fs.info(path, refresh=True)["size"]
        if stored != size:
            raise StorageError(f"{self.location}/{name} has {stored} bytes after {size} were written")
        total = total if checksum is None else checksum()
        return Written(name=name, size_bytes=size, checksum=f"crc32c:{total:08x}")

    @contextlib.contextmanager
    def _upload(self, path: str, size_bytes: int) -> Iterator[Any]:
        """A file that appears only when it is complete."""
        block_bytes = max(MIN_UPLOAD_BYTES, -(-size_bytes // MAX_UPLOAD_PARTS))
        file = self._fs.open(path, "wb", block_size=block_bytes, autocommit=False)
        try:
            yield file
            file.close()
            file.commit()
        except BaseException:
            file.closed = True  # else its finaliser would upload the rest
            with contextlib.suppress(Exception):  # the first error is reported; `sweep` removes the rest
                file.discard()
            raise

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        path = f"{self._root}/{name}"
        with self._named("read", name):
            with self._fs.open(path, "rb", block_size=_READ_BYTES, cache_type="readahead") as file:
                yield file

    def names(self) -> list[str]:
        return [name for name, kind in self._entries() if kind == "file"]

    def below(self) -> list[str]:
        return [f"{self.location}/{name}" for name, kind in self._entries() if kind == "directory"]

    def delete(self, name: str) -> None:
        with self._named("delete", name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def sweep(self, wanted: Callable[[str], bool]) -> None:
        """Abort incomplete uploads, which are invisible but stored and billed."""
        if not hasattr(self._fs, "list_multipart_uploads"):
            return
        bucket, _, prefix = self._root.partition("/")
        with self._named("sweep", ""):
            for upload in self._fs.list_multipart_uploads(bucket):
                directory, _, name = upload["Key"].rpartition("/")
                if directory == prefix and wanted(name):
                    self._fs.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

    def remove(self) -> None:
        with self._named("remove", ""), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._root, recursive=True)

    def _entries(self) -> list[tuple[str, str]]:
        with self._named("list", ""):
            try:
                found = self._fs.ls(self._root, detail=True, refresh=True)
            except FileNotFoundError:
                return []
        entries = ((entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in found)
        return sorted(entry for entry in entries if entry[0])

    @contextlib.contextmanager
    def _named(self, doing: str, name: str) -> Iterator[None]:
        where = f"{self.location}/{name}".rstrip("/")
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            if doing == "read" and self._is_there():
                raise DamagedError(f"{where} is gone") from None
            raise StorageError(f"cannot {doing} {where}: {error}", action="check that the bucket exists") from None
        except Exception as error:  # each client has its own error classes, not below OSError
            text = str(error) or type(error).__name__
            raise StorageError(
                f"cannot {doing} {where}: {text}", action="check the store, and the credentials of the daemons"
            ) from error

    def _is_there(self) -> bool:
        """Whether the bucket answers: only then is a missing file lost."""
        try:
            self._fs.ls(self._root.partition("/")[0], detail=False, refresh=True)
        except Exception:  # of any kind: then it is unknown whether the bucket exists
            return False
        return True
