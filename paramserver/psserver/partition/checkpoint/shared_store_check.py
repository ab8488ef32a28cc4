"""Whether a store that should be shared is: every partition's files must be seen wherever a partition may be restored.

A directory that is not mounted on one server looks like any other until a partition is lost; then its parts are gone,
and with them every step. So each partition looks for the others' files, and says so when there are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pscluster.errors import StorageError

PATIENCE_S = 90.0
"""How long another's files may be missing: network file systems show new ones late, by default up to a minute."""


class SharedStoreCheck:
    """On the thread that writes snapshots. `partition` is one's own of `num_partitions`."""

    def __init__(self, partition: int, num_partitions: int) -> None:
        self._others = frozenset(range(num_partitions)) - {partition}
        self._since_s = math.inf  # when somebody's files were first missing
        self._told = False

    def look(self, location: str, seen: Iterable[int], now_s: float) -> StorageError | None:
        """After the catalogue has a snapshot of all partitions: what is wrong when only the files of the partitions
        `seen` are there. Told once; None: nothing, or nothing new."""
        missing = sorted(self._others.difference(seen))
        if not missing or self._told:
            self._since_s = math.inf
            return None
        self._since_s = min(self._since_s, now_s)
        if now_s - self._since_s < PATIENCE_S:
            return None
        self._told = True
        names = ", ".join(f"partition-{index}" for index in missing)
        return StorageError(
            f"{location} shows nothing that {names} wrote there: it is not shared, and a lost partition that starts "
            "elsewhere would find no snapshot",
            action="mount it on all servers, start each psserver with --own-store, or set durability.store",
        )
