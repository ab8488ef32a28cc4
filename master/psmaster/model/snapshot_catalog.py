"""Which snapshots of a job exist. Pure: a catalogue is a value, every change gives a new one.

A snapshot exists only when every partition's part of that step has been reported. Parts of an older generation than the
job's newest restore are refused by the caller of `add` (see `job.Job.counts`); a restore drops the half-reported rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from psmaster.model.plan import Part, RestorePoint

NEWEST_KEPT = 2  # complete snapshots kept beside the best


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The reported parts of one job, by (step, partition)."""

    num_partitions: int
    parts: Mapping[tuple[int, int], Part] = field(default_factory=lambda: MappingProxyType({}))

    def complete_steps(self) -> tuple[int, ...]:
        """The steps of which every part is there, rising."""
        counts = Counter(step for step, _ in self.parts)
        return tuple(sorted(step for step, count in counts.items() if count == self.num_partitions))

    def complete(self, step: int) -> bool:
        return all((step, index) in self.parts for index in range(self.num_partitions))

    def newest(self) -> RestorePoint | None:
        """The newest complete snapshot; None: go back to the seed."""
        return next(reversed(self.restore_points()), None)

    def restore_points(self) -> list[RestorePoint]:
        """The complete snapshots, oldest first."""
        return [self.restore_point(step) for step in self.complete_steps()]

    def restore_point(self, step: int) -> RestorePoint:
        """The complete snapshot of `step`; KeyError when it is not complete."""
        return RestorePoint(step=step, parts=tuple(self.parts[step, index] for index in range(self.num_partitions)))


def kept_steps(catalogue: Catalogue, pinned: frozenset[int]) -> tuple[int, ...]:
    """The steps to keep, rising: the two newest complete ones and the pinned (best) ones before them, complete yet or
    not. Partitions delete what is older than the last of these, so the last is always a complete one: with a pinned
    step that is still being written, they would delete parts of an earlier step that is still being written, too."""
    complete = catalogue.complete_steps()
    if not complete:
        return ()
    return tuple(sorted({step for step in pinned if step < complete[-1]}.union(complete[-NEWEST_KEPT:])))


def is_outrun(catalogue: Catalogue, step: int, pinned: frozenset[int]) -> bool:
    """Whether partitions may have deleted the parts of `step`, as they do with what is older than the newest complete
    snapshot and not kept: a report that was delayed for long must not make such a snapshot complete."""
    kept = kept_steps(catalogue, pinned)
    return bool(kept) and step < kept[-1] and step not in kept


def add(catalogue: Catalogue, part: Part) -> Catalogue:
    """With `part`. A repeat gives an equal catalogue; a newer generation's part of a step replaces the older one, a
    late older one changes nothing, nor does one of a partition that the job does not have."""
    key = (part.step, part.partition)
    held = catalogue.parts.get(key)
    if not 0 <= part.partition < catalogue.num_partitions or (held and held.generation > part.generation):
        return catalogue
    return replace(catalogue, parts=MappingProxyType({**catalogue.parts, key: part}))


def prune(catalogue: Catalogue, pinned: frozenset[int]) -> Catalogue:
    """Without the complete snapshots that are no longer kept and the half-reported ones that newer ones outran, but
    with all of the `pinned` (best) steps."""
    complete = catalogue.complete_steps()
    if not complete:
        return catalogue
    keep = set(complete[-NEWEST_KEPT:]) | pinned
    return _where(catalogue, lambda step: step in keep or step > complete[-1])


def settle_for_restore(catalogue: Catalogue) -> Catalogue:
    """What is left when the job goes back to its newest complete snapshot: the complete ones alone."""
    complete = frozenset(catalogue.complete_steps())
    return _where(catalogue, lambda step: step in complete)


def without(catalogue: Catalogue, step: int) -> Catalogue:
    """Without the snapshot of `step`, which turned out to be unreadable."""
    return _where(catalogue, lambda held: held != step)


def _where(catalogue: Catalogue, wanted: Callable[[int], bool]) -> Catalogue:
    parts = {key: part for key, part in catalogue.parts.items() if wanted(key[0])}
    if len(parts) == len(catalogue.parts):
        return catalogue
    return replace(catalogue, parts=MappingProxyType(parts))
