"""Which of a job's snapshots is meant. Pure."""

from __future__ import annotations

from pscluster.client.records import Snapshot
from pscluster.errors import NotFoundError


def choose(snapshots: list[Snapshot], which: int | str, job: str) -> Snapshot:
    """Pick by "last", "best" or step. Raises NotFoundError naming the steps there are."""
    for snapshot in reversed(snapshots):
        if which in ("last", snapshot.step) or (which == "best" and snapshot.best):
            return snapshot
    wanted = {"last": "yet", "best": "of its best step yet"}.get(str(which), f"of step {which}")
    steps = ", ".join(f"{s.step} (best)" if s.best else str(s.step) for s in snapshots)
    none = "one is written every durability.every_steps and at the end"
    raise NotFoundError(f"{job} has no complete snapshot {wanted}", action=f"there are: {steps}" if steps else none)
