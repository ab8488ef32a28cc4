"""Which values may land in the replica's memory, and which have. Pure bookkeeping; the exchange's lock guards it."""

from __future__ import annotations

from typing import Literal

from pscluster.step.layout import Layout

Place = tuple[int, int]  # partition, bucket


class Landing:
    """Values land straight in the memory that forward and backward use. So they land only for exactly the version that
    the main thread wants, which it changes only between microbatches; whatever else comes is read and dropped."""

    def __init__(self, layout: Layout, num_partitions: int) -> None:
        self._layout = layout
        self._num_partitions = num_partitions
        self._have_frozen = False
        self.wanted = -1
        self.exact = False  # whether the wanted values are those that are not rounded
        self.ahead = -1  # the newest version seen that was not wanted
        self._missing: dict[Place, bool] = {}  # of the wanted version; True: begun
        self._exact_before = False  # whether those of the version before the wanted one were
        self._holds_before = False  # whether the memory still holds all of that version

    @property
    def is_complete(self) -> bool:
        """Everything of the wanted version is there."""
        return not self._missing

    @property
    def is_superseded(self) -> bool:
        """A newer version was seen: the wanted one may never come."""
        return self.ahead > self.wanted

    @property
    def needs_frozen(self) -> bool:
        return not self._have_frozen

    def want(self, version: int, exact: bool = False) -> Literal["held", "round", "missing", "asked", "gone"]:
        """Change what is wanted. "missing": the values are to be asked for; "asked": they were, and are on their way;
        "held": they are in memory; "round": they are, but exact, and are to be rounded.

        Going back to the version before is possible while nothing of the wanted one has begun to land; "gone": too
        late."""
        if (version, exact) == (self.wanted, self.exact):
            return "asked" if self._missing else "held"
        if version < self.wanted:
            if not self._holds_before:
                return "gone"
            self._holds_before = False
            self.wanted, self.exact, self._missing = version, self._exact_before, {}
        if version > self.wanted:
            self._exact_before, self._holds_before = self.exact, self.wanted >= 0 and not self._missing
            self.wanted, self.exact, self._missing = version, exact, dict.fromkeys(self._places(), False)
        if self.exact != exact:
            rounds = self.exact and not self._missing
            self.exact = exact
            if rounds:
                return "round"
            self._missing = dict.fromkeys(self._places(), False)
        return "missing" if self._missing else "held"

    def is_missing_from(self, partition: int) -> bool:
        return any(p == partition for p, _ in self._missing)

    def begin(self, place: Place, version: int, exact: bool = False) -> bool:
        """Values arrive: whether they may land. From True until `finish`, or for good if the connection breaks, the
        memory holds neither the old version nor the new one."""
        if (version, exact) != (self.wanted, self.exact) or place not in self._missing:
            return False
        self._missing[place] = True
        self._holds_before = False
        return True

    def has_bucket(self, bucket: int) -> bool:
        """All of one bucket of the wanted version is there."""
        return not any(b == bucket for _, b in self._missing)

    def finish(self, place: Place, version: int) -> bool:
        """Values have arrived, landed or not; True if a bucket of the wanted version became complete."""
        if version != self.wanted:
            self.ahead = max(self.ahead, version)
            return False
        if not self._missing.get(place):
            return False
        del self._missing[place]
        self._have_frozen = self._have_frozen or not self._missing
        return self.has_bucket(place[1])

    def restart(self) -> None:
        """Another timeline: versions count anew. What never changes is still there."""
        self.wanted, self.ahead, self._missing = -1, -1, {}
        self.exact = self._exact_before = self._holds_before = False

    def _places(self) -> list[Place]:
        return [
            (partition, bucket.index)
            for bucket in self._layout.buckets
            for partition in range(self._num_partitions)
            if (bucket.kind != "frozen" or not self._have_frozen)
            and self._layout.span(bucket.index, partition, self._num_partitions).num_words
        ]
