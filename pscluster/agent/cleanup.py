"""Removes from a node what no job needs any more: bundles, scratch directories, and what the cache has too much."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence

import structlog

from pscluster.agent import cache
from pscluster.agent.directories import AgentDirectories, BundleCache
from pscluster.agent.supervisor import Supervisor
from pscluster.errors import PsError

INTERVAL_S = 15.0
FindUnused = Callable[[Sequence[str], Sequence[str]], Awaitable[tuple[Sequence[str], Sequence[str]]]]
"""Of these bundles and jobs, the bundles that no job has, and the jobs that have ended. Raises PsError."""
_log = structlog.get_logger(__name__)


class Cleanup:
    """Used from the agent's loop; disk work runs on threads."""

    def __init__(
        self, directories: AgentDirectories, bundles: BundleCache, cache_bytes: int, find_unused: FindUnused
    ) -> None:
        self._directories = directories
        self._bundles = bundles
        self._cache_bytes = cache_bytes
        self._find_unused = find_unused

    async def run(self, supervisor: Supervisor) -> None:
        """Look again and again; never returns. A master that does not answer is asked again later."""
        while True:
            try:
                await self.clean(supervisor)
            except PsError as error:
                _log.debug("the master does not say what is unused", code=error.code, cause=error.cause)
            except OSError as error:
                _log.warning("cannot remove what is unused", error=str(error))
            await asyncio.sleep(INTERVAL_S)

    async def clean(self, supervisor: Supervisor) -> None:
        """Remove what is not needed now. Raises PsError when the master does not answer, OSError."""
        for name in await asyncio.to_thread(cache.evict, self._directories.cache, self._cache_bytes):
            _log.info("evicted from the cache", entry=name)
        bundles = [sha256 for sha256 in self._bundles.held if sha256 not in supervisor.bundles]
        kept = await asyncio.to_thread(lambda: [path.name for path in self._directories.scratch.iterdir()])
        jobs = [job_id for job_id in kept if job_id not in supervisor.jobs]
        if not bundles and not jobs:
            return
        unused, ended = await self._find_unused(bundles, jobs)
        await self._bundles.remove(set(unused) & set(bundles) - supervisor.bundles)
        for job_id in set(ended) & set(jobs) - supervisor.jobs:
            await asyncio.to_thread(shutil.rmtree, self._directories.scratch / job_id, ignore_errors=True)
