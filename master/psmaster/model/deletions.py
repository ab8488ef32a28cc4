"""The jobs that were deleted, for as long as something of them may be left: in a store that was away, or that a kill
kept from being removed; on a node that was away and has parts on a disk of its own. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

KEPT_S = 30 * 24 * 3600.0  # how long a node that is away is waited for
GIVEN_UP_S = 365 * 24 * 3600.0  # and a store
MAX_NAMED = 1000  # in what a node is told, which must stay small


@dataclass(frozen=True, kw_only=True, slots=True)
class Deletion:
    """One deleted job. `store`: where its snapshots were. `deleted_s`: Unix time. `removed`: nothing is left there."""

    job_id: str
    store: str
    deleted_s: float
    removed: bool = False


Deletions = Mapping[str, Deletion]
"""By job, the newest last."""


def remembered(deletions: Deletions, now_s: float) -> Deletions:
    """Without those that nobody needs any more: the store is gone, or given up, and no node is waited for."""
    if not any(_is_over(one, now_s) for one in deletions.values()):
        return deletions
    return {job_id: one for job_id, one in deletions.items() if not _is_over(one, now_s)}


def _is_over(one: Deletion, now_s: float) -> bool:
    return now_s - one.deleted_s > (KEPT_S if one.removed else GIVEN_UP_S)


def named(deletions: Deletions) -> tuple[str, ...]:
    """The jobs that nodes are told of, the newest first."""
    return tuple(islice(reversed(list(deletions)), MAX_NAMED))


def changed(before: Deletions, after: Deletions) -> tuple[tuple[Deletion, ...], tuple[str, ...]]:
    """What must be stored to come from `before` to `after`: records, and the ids of those to be forgotten."""
    if before is after:
        return (), ()
    put = tuple(one for job_id, one in after.items() if before.get(job_id) != one)
    return put, tuple(job_id for job_id in before if job_id not in after)
