"""Code bundles on a node: downloaded once, verified, extracted once, and evicted least recently used first."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import structlog

from pscluster.errors import BundleError, StorageError
from pscluster.job.bundle import CAP_BYTES, extract

KEPT = 16
"""Extracted bundles kept beside those in use."""

Fetch = Callable[[str], AsyncIterator[bytes]]
"""The chunks of the bundle with this digest; raises PsError."""

_log = structlog.get_logger(__name__)


class BundleCache:
    """Directories named by content digest below `directory`. Used from the agent's loop; disk work runs on threads."""

    def __init__(self, directory: Path, fetch: Fetch) -> None:
        self._directory = directory
        self._fetch = fetch
        self._locks: dict[str, asyncio.Lock] = {}
        present = sorted(path.name for path in directory.iterdir() if path.is_dir())
        self._used: OrderedDict[str, None] = OrderedDict.fromkeys(present)

    async def ensure(self, sha256: str) -> Path:
        """The directory of the bundle, downloaded if it is missing. Safe to call concurrently and to repeat.

        Raises BundleError for content that does not match its digest or cannot be extracted safely, StorageError when
        it cannot be written, and what `fetch` raises.
        """
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise BundleError(f"{sha256!r} is not a sha256 digest")
        target = self._directory / sha256
        async with self._locks.setdefault(sha256, asyncio.Lock()):
            if not target.is_dir():
                await self._download(sha256, target)
        self._used[sha256] = None
        self._used.move_to_end(sha256)
        return target

    async def trim(self, in_use: Collection[str]) -> None:
        """Remove the least recently used beyond KEPT, never one of `in_use`."""
        idle = [sha256 for sha256 in self._used if sha256 not in in_use]
        for sha256 in idle[: max(0, len(idle) - KEPT)]:
            del self._used[sha256]
            self._locks.pop(sha256, None)
            await asyncio.to_thread(shutil.rmtree, self._directory / sha256, ignore_errors=True)

    async def _download(self, sha256: str, target: Path) -> None:
        part = self._directory / f"{sha256}.part"
        digest = hashlib.sha256()
        size = 0
        try:
            with part.open("wb") as sink:
                async for chunk in self._fetch(sha256):
                    size += len(chunk)
                    if size > CAP_BYTES:
                        raise BundleError(f"bundle {sha256[:12]} is longer than {CAP_BYTES} bytes")
                    digest.update(chunk)
                    sink.write(chunk)
            if digest.hexdigest() != sha256:
                raise BundleError(f"bundle {sha256[:12]} does not match its digest")
            await asyncio.to_thread(extract, part, target)
        except OSError as error:
            raise StorageError(f"cannot store bundle {sha256[:12]}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
        _log.info("bundle extracted", sha256=sha256, size_bytes=size)
