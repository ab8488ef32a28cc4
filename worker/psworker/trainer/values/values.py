"""Values arriving in the replica's memory: over a socket, rounded or not, or as windows onto shared memory.

`Landing` keeps which may land, and which have; `Values` moves their bytes. A window shows whatever its
partition holds, also when that moves on while a forward or backward still runs. That does no harm: a partition
overwrites the values of step t only after every gradient of step t is in, everywhere, and so whatever is computed from
torn values is a duplicate that every gate drops.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from pscluster.errors import FrameError
from pscluster.job.spec import JobSpec
from pscluster.step.codec import DTYPES, as_bytes
from pscluster.step.layout import Codec as CodecName
from pscluster.step.layout import Layout, Span
from pscluster.wire.frame import EXACT, WITH_FROZEN, Codec, Header
from pscluster.wire.memory import Arena, Segment, page_offsets
from psworker.replica import BucketMemory

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
        """A restore: versions count anew. Buckets that never change are still there."""
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


class Shared(NamedTuple):
    """What a partition on this host shares: its segment, and a view of it that torch takes without a warning."""

    segment: Segment
    view: Arena


class Values:
    """`landing` is guarded by `changed`, which is notified when a bucket is there; the rest is the reactor thread's."""

    def __init__(self, spec: JobSpec, layout: Layout, memory: BucketMemory, changed: threading.Condition) -> None:
        self.memory = memory
        self.landing = Landing(layout, spec.servers.partitions)
        self._layout = layout
        self._num_partitions = spec.servers.partitions
        self._codec: CodecName = spec.network.pull_codec
        self._changed = changed
        self._shared: dict[int, Shared] = {}  # by partition
        self._narrow: dict[int, torch.Tensor] = {}  # by partition: rounded values being received
        self._known_places: dict[int, tuple[list[int], int]] = {}
        self._narrow_memory: dict[int, bytearray] = {}

    def want(self, version: int, exact: bool) -> str:
        """`Landing.want`, and rounds what is held when that is the answer. On the main thread, between microbatches."""
        with self._changed:
            answer = self.landing.want(version, exact and self._codec != "fp32")
        if answer == "round":
            self._round()
        return answer

    def wanted_from(self, index: int) -> tuple[int, int] | None:
        """The step and flags of a PULL of what is missing from a partition; None: nothing is."""
        with self._changed:
            landing = self.landing
            if not landing.is_missing_from(index):
                return None
            return landing.wanted, (WITH_FROZEN if landing.needs_frozen else 0) | (EXACT if landing.exact else 0)

    def restart(self) -> None:
        """Drop what all partitions shared: they are dialed anew."""
        self._shared.clear()

    def forget(self, index: int) -> None:
        """Drop what a partition shared: another process has taken over."""
        self._shared.pop(index, None)
        self._narrow.pop(index, None)

    def map(self, index: int, fd: int) -> None:
        """A partition shares its values; takes over `fd`. Raises FrameError."""
        size = self._places(index)[1]
        segment, view = Segment.open(fd, size, writable=False), Arena(size)
        view.show(0, segment, 0, size)
        self._shared[index] = Shared(segment, view)

    def target(self, index: int, header: Header) -> memoryview | None:
        """Memory for the body of a VALUES frame; None: it is not wanted. Raises FrameError."""
        span = self._arriving(index, header)
        self._narrow.pop(index, None)  # of a connection that broke
        expected = self._layout.wire_bytes(span, "fp32" if header.codec is Codec.FP32 else self._codec)
        if header.length != expected:
            raise FrameError(f"values of {header.length} bytes where {expected} fit", details={"field": "length"})
        if not self._begin(index, header):
            return None
        if header.codec is Codec.FP32:
            return as_bytes(self.memory.writable(span))
        memory = self._narrow_memory.get(index, bytearray())
        if len(memory) < header.length:
            memory = self._narrow_memory[index] = bytearray(header.length)
        self._narrow[index] = torch.frombuffer(memory, dtype=DTYPES[self._codec], count=span.num_words)
        return memoryview(memory)[: header.length]

    def landed(self, index: int, header: Header) -> None:
        """The body that `target` gave memory for is complete."""
        narrow = self._narrow.pop(index, None)
        if narrow is not None:
            self.memory.writable(self._span(index, header.bucket)).copy_(narrow)
        self._finish(index, header)

    def shown(self, index: int, header: Header) -> None:
        """Values of a run of buckets lie in the memory that the partition shares. Raises FrameError."""
        shared = self._shared.get(index)
        if shared is None:
            raise FrameError("values in memory that is not shared", details={"field": "flags"})
        if header.node.first != header.bucket or not 1 <= header.node.leaves <= len(self._layout.buckets):
            raise FrameError(f"values of the buckets {tuple(header.node)}", details={"field": "node"})
        for bucket in range(header.bucket, header.bucket + header.node.leaves):
            one = replace(header, bucket=bucket)
            self._show(index, one, self._arriving(index, one), shared)

    def _show(self, index: int, header: Header, span: Span, shared: Shared) -> None:
        if header.flags & EXACT and self._is_rounded(header.bucket):
            raise FrameError("exact values in memory that has rounded ones", details={"field": "flags"})
        if self._begin(index, header):
            offset, target = self._places(index)[0][header.bucket], self.memory.words(span)
            if header.codec is Codec.FP32 and self.memory.may_window:
                self.memory.show(span, shared.segment, offset)
            else:
                dtype = target.dtype if header.codec is Codec.FP32 else DTYPES[self._codec]
                source = torch.frombuffer(shared.view.view, dtype=dtype, offset=offset, count=span.num_words)
                self.memory.writable(span).copy_(source)
        self._finish(index, header)

    def _begin(self, index: int, header: Header) -> bool:
        with self._changed:
            return self.landing.begin((index, header.bucket), header.step, bool(header.flags & EXACT))

    def _finish(self, index: int, header: Header) -> None:
        with self._changed:
            if self.landing.finish((index, header.bucket), header.step) or self.landing.is_superseded:
                self._changed.notify_all()

    def _arriving(self, index: int, header: Header) -> Span:
        if header.bucket >= len(self._layout.buckets):
            raise FrameError(f"values of bucket {header.bucket}", details={"field": "bucket"})
        rounded = self._is_rounded(header.bucket) and not header.flags & EXACT
        expected = Codec.of(self._codec) if rounded else Codec.FP32
        if header.codec is not expected:
            raise FrameError(f"values in {header.codec.name}, not {expected.name}", details={"field": "codec"})
        span = self._span(index, header.bucket)
        if not span.num_words:
            raise FrameError(f"values of bucket {header.bucket}, of which it holds none", details={"field": "bucket"})
        return span

    def _is_rounded(self, bucket: int) -> bool:
        """Whether trainers get the bucket rounded unless they ask for exact values."""
        return self._codec != "fp32" and self._layout.buckets[bucket].kind == "trained"

    def _span(self, index: int, bucket: int) -> Span:
        return self._layout.span(bucket, index, self._num_partitions)

    def _places(self, index: int) -> tuple[list[int], int]:
        """Where a partition's buckets begin in the memory that it shares, and the length of that."""
        if index not in self._known_places:
            spans = self._layout.spans(index, self._num_partitions)
            self._known_places[index] = page_offsets(self._layout.wire_bytes(span, self._codec) for span in spans)
        return self._known_places[index]

    def _round(self) -> None:
        """Exact values are in memory: make them what a pull would have brought."""
        for bucket in self._layout.buckets:
            if bucket.kind == "trained":
                flat = self.memory.flats[bucket.index]
                flat.copy_(flat.to(DTYPES[self._codec]))
