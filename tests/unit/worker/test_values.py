"""Values on their way into a replica: by a socket or through shared memory, rounded or not, from two partitions."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import replace

import pytest
import torch

from harness.played import job_header, played_spec
from pscluster.errors import FrameError
from pscluster.step.codec import DTYPES, as_bytes
from pscluster.step.layout import BLOCK_WORDS, Layout, TensorSpec
from pscluster.step.layout import Codec as CodecName
from pscluster.step.tree import TreeNode
from pscluster.wire.frame import EXACT, IN_MEMORY, NO_NODE, WITH_FROZEN, Codec, FrameKind, Header
from psserver.partition.step.state import PartitionState
from psworker.replica import BucketMemory
from psworker.trainer.values.values import Values

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(3 * BLOCK_WORDS + 5,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(3,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
        TensorSpec(names=("fixed",), shape=(3,), dtype="float32", kind="frozen"),
    )
)
TRAINED, AVERAGED, CARRIED, FROZEN = range(4)
CODECS: list[CodecName] = ["fp32", "bf16"]
WAYS = pytest.mark.parametrize("shared", [False, True], ids=["socket", "memory"])


class Told(threading.Condition):
    """Counts how often those who wait were woken."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def notify_all(self) -> None:
        self.times += 1
        super().notify_all()


class Played:
    """Two partitions' states, and the values of a trainer that hears from them frame by frame."""

    def __init__(self, codec: CodecName) -> None:
        self.codec = codec
        spec = played_spec(1, 2, network={"pull_codec": codec})
        self.changed = Told()
        self.memory = BucketMemory(LAYOUT)
        self.values = Values(spec, LAYOUT, self.memory, self.changed)
        self.states = [PartitionState.empty(LAYOUT, index, 2, 0, codec) for index in range(2)]
        self.set(1.0)
        for index, state in enumerate(self.states):
            self.values.map(index, os.dup(state.segment.fd))

    def set(self, factor: float) -> None:
        """New values, none of which bf16 can hold, of all that ever changes."""
        for index, state in enumerate(self.states):
            for span, values in zip(state.spans, state.values, strict=True):
                by = 1.0 if span.bucket == FROZEN else factor
                numbers = torch.arange(span.num_words) + 1000 * index + span.bucket
                values.copy_(numbers * by / 3 if values.dtype == torch.float32 else numbers * by)
                state.publish(span.bucket)

    def header(self, index: int, bucket: int, version: int, *, exact: bool, shared: bool) -> Header:
        """What a partition says of its values."""
        trained = LAYOUT.buckets[bucket].kind == "trained"
        rounds = trained and not exact and self.codec == "bf16"
        shared = shared and not (trained and exact and self.codec == "bf16")
        flags = (EXACT if exact else 0) | (IN_MEMORY if shared else 0)
        span = self.states[index].spans[bucket]
        length = 0 if shared else span.num_words * (2 if rounds else 4)
        codec, node = Codec.BF16 if rounds else Codec.FP32, TreeNode(bucket, 1) if shared else NO_NODE
        return job_header(
            FrameKind.VALUES, step=version, bucket=bucket, node=node, flags=flags, codec=codec, length=length
        )

    def words(self, index: int, header: Header) -> bytes:
        state = self.states[index]
        words = state.values[header.bucket] if header.flags & EXACT else state.published[header.bucket]
        return as_bytes(words).tobytes()

    def arrive(self, index: int, bucket: int, version: int, *, exact: bool = False, shared: bool = False) -> bool:
        """A whole frame of values; whether its body was wanted."""
        header = self.header(index, bucket, version, exact=exact, shared=shared)
        if header.flags & IN_MEMORY:
            self.values.shown(index, header)
            return True
        target = self.values.target(index, header)
        if target is not None:
            target[:] = self.words(index, header)
        self.values.landed(index, header)
        return target is not None

    def arrive_all(self, version: int, *, exact: bool = False, shared: bool = False) -> None:
        for index, state in enumerate(self.states):
            for span in state.spans:
                if span.num_words:
                    self.arrive(index, span.bucket, version, exact=exact, shared=shared)

    def holds(self, *, exact: bool) -> bool:
        """Whether the memory is what the partitions hold (exact), or that rounded."""
        for state in self.states:
            for span, values in zip(state.spans, state.values, strict=True):
                trained = LAYOUT.buckets[span.bucket].kind == "trained"
                wanted = values.to(DTYPES[self.codec]).float() if trained and not exact else values
                if not torch.equal(self.memory.words(span), wanted):
                    return False
        return True


@pytest.mark.parametrize("codec", CODECS)
@WAYS
@pytest.mark.parametrize("exact", [False, True], ids=["as pulled", "exact"])
def test_values_land_as_they_were_wanted_by_either_way(exact: bool, shared: bool, codec: CodecName) -> None:
    played = Played(codec)
    assert played.values.want(5, exact) == "missing"
    asks_exact = exact and codec == "bf16"  # without rounding all are exact
    assert played.values.wanted_from(0) == (5, WITH_FROZEN | (EXACT if asks_exact else 0))
    played.arrive_all(5, exact=asks_exact, shared=shared)

    assert played.values.landing.is_complete
    assert played.holds(exact=exact)
    assert played.holds(exact=not exact) is (codec == "fp32")
    assert played.values.want(5, exact) == "held"
    assert played.changed.times == len(LAYOUT.buckets), "once for each whole bucket"
    assert played.values.wanted_from(0) is None
    played.values.want(6, exact=False)
    assert played.values.wanted_from(0) == (6, 0), "what never changes is there"


def test_unrounded_values_in_shared_memory_are_not_copied() -> None:
    played = Played("fp32")
    played.values.want(5, exact=False)
    played.arrive_all(5, shared=True)
    played.set(2.0)

    assert played.holds(exact=True)


def test_rounded_values_are_copied_when_they_are_shown() -> None:
    played = Played("bf16")
    played.values.want(5, exact=False)
    played.arrive_all(5, shared=True)
    before = played.memory.flats[TRAINED].clone()
    played.set(2.0)

    assert torch.equal(played.memory.flats[TRAINED], before)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("first", [False, True], ids=["socket first", "memory first"])
def test_the_way_may_change_from_version_to_version(first: bool, codec: CodecName) -> None:
    """A connection comes back over TCP, say: the same place is a window, then not, then one again."""
    played = Played(codec)
    for version, shared in enumerate((first, not first, first), start=1):
        played.set(float(version))
        played.values.want(version, exact=False)
        played.arrive_all(version, shared=shared)
        assert played.values.landing.is_complete
        assert played.holds(exact=False)


def test_exact_values_are_rounded_when_training_goes_on() -> None:
    played = Played("bf16")
    played.values.want(5, exact=True)
    played.arrive_all(5, exact=True)
    assert played.holds(exact=True)

    assert played.values.want(5, exact=False) == "round"
    assert played.holds(exact=False)


def test_narrow_bodies_of_two_partitions_arrive_at_the_same_time() -> None:
    played = Played("bf16")
    played.values.want(5, exact=False)
    headers = [played.header(index, TRAINED, 5, exact=False, shared=False) for index in range(2)]
    targets = [played.values.target(index, header) for index, header in enumerate(headers)]
    for half in (0, 1):
        for index, header in enumerate(headers):
            target, words = targets[index], played.words(index, header)
            assert target is not None
            part = slice(half * len(words) // 2, (half + 1) * len(words) // 2)
            target[part] = words[part]
    for index in (1, 0):
        played.values.landed(index, headers[index])

    assert played.values.landing.has_bucket(TRAINED)
    assert torch.equal(
        played.memory.flats[TRAINED],
        torch.cat([s.published[TRAINED].float() for s in sorted(played.states, key=lambda s: s.spans[TRAINED].start)]),
    )


@pytest.mark.parametrize("codec", CODECS)
@WAYS
def test_a_connection_that_breaks_in_the_middle_of_a_body(shared: bool, codec: CodecName) -> None:
    """What came of it counts for nothing; the next connection brings other buckets first."""
    played = Played(codec)
    played.values.want(5, exact=False)
    header = played.header(0, TRAINED, 5, exact=False, shared=False)
    target = played.values.target(0, header)
    assert target is not None
    target[: len(target) // 2] = b"\xff" * (len(target) // 2)
    before = played.memory.words(played.states[1].spans[TRAINED]).clone()
    for index, state in enumerate(played.states):
        for bucket in (FROZEN, CARRIED, AVERAGED):
            if state.spans[bucket].num_words:
                played.arrive(index, bucket, 5, shared=shared)
    assert not played.values.landing.has_bucket(TRAINED)
    assert torch.equal(played.memory.words(played.states[1].spans[TRAINED]), before)

    for index in range(2):
        played.arrive(index, TRAINED, 5, shared=shared)
    assert played.values.landing.is_complete
    assert played.holds(exact=False)


@WAYS
@pytest.mark.parametrize("exact", [False, True], ids=["as pulled", "exact"])
def test_late_values_of_the_other_exactness_change_nothing(exact: bool, shared: bool) -> None:
    played = Played("bf16")
    played.values.want(5, exact)
    played.arrive_all(5, exact=exact, shared=shared)
    before = [flat.clone() for flat in played.memory.flats]
    played.arrive_all(5, exact=not exact, shared=shared)
    played.values.want(6, exact)
    played.arrive_all(6, exact=not exact, shared=shared)

    assert all(torch.equal(flat, old) for flat, old in zip(played.memory.flats, before, strict=True))
    assert not played.values.landing.is_complete
    played.arrive_all(6, exact=exact, shared=shared)
    assert played.values.landing.is_complete and played.holds(exact=exact)


@WAYS
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("version", [4, 6])
def test_a_version_that_is_not_wanted_changes_nothing(version: int, codec: CodecName, shared: bool) -> None:
    played = Played(codec)
    played.values.want(5, exact=False)
    played.arrive_all(version, shared=shared)

    assert not any(flat.any() for flat in played.memory.flats)
    assert not played.values.landing.is_complete
    assert played.values.landing.is_superseded is (version == 6)
    assert (played.changed.times > 0) is (version == 6), "who waits is told that it waits in vain"


# ---- what does not fit ----


def refused(played: Played, header: Header, index: int = 0) -> str:
    receive = played.values.shown if header.flags & IN_MEMORY else played.values.target
    with pytest.raises(FrameError) as error:
        receive(index, header)
    return error.value.details["field"]


def of(header: Header, bucket: int) -> Header:
    """The same said of another bucket."""
    return replace(header, bucket=bucket, node=TreeNode(bucket, 1) if header.flags & IN_MEMORY else NO_NODE)


@WAYS
@pytest.mark.parametrize("codec", CODECS)
def test_values_that_do_not_fit_are_refused_by_name_and_change_nothing(codec: CodecName, shared: bool) -> None:
    played = Played(codec)
    played.values.want(5, exact=False)
    fits = played.header(0, TRAINED, 5, exact=False, shared=shared)
    other = Codec.FP32 if fits.codec is Codec.BF16 else Codec.BF16
    elsewhere = next(i for i, s in enumerate(played.states) if not s.spans[AVERAGED].num_words)
    found = {
        "no bucket": refused(played, of(fits, 4)),
        "not its own": refused(played, replace(of(fits, AVERAGED), codec=Codec.FP32), elsewhere),
        "another codec": refused(played, replace(fits, codec=other)),
        "rounded buffers": refused(played, replace(of(fits, AVERAGED), codec=Codec.BF16)),
    }
    assert found == {
        "no bucket": "bucket", "not its own": "bucket", "another codec": "codec", "rounded buffers": "codec",
    }  # fmt: skip
    if not shared:
        assert {refused(played, replace(fits, length=n)) for n in (0, fits.length - 1, fits.length * 2)} == {"length"}
    assert not any(flat.any() for flat in played.memory.flats)
    assert not any(played.values.landing._missing.values()), "nothing has begun to land"


def test_values_in_memory_that_was_not_shared_are_refused() -> None:
    played = Played("fp32")
    played.values.want(5, exact=False)
    played.values.restart()

    assert refused(played, played.header(0, TRAINED, 5, exact=False, shared=True)) == "flags"


def test_exact_values_where_only_rounded_ones_are_shared_are_refused() -> None:
    """The memory is half as long as they would be: a window would reach beyond its end, and touching it is fatal."""
    played = Played("bf16")
    played.values.want(5, exact=True)
    header = job_header(FrameKind.VALUES, step=5, bucket=TRAINED, node=TreeNode(TRAINED, 1), flags=EXACT | IN_MEMORY)

    assert refused(played, header) == "flags"


@pytest.mark.parametrize(
    "node", [NO_NODE, TreeNode(1, 1), TreeNode(0, 0), TreeNode(0, 5), TreeNode(0, 2**32 - 1), TreeNode(0, 2)], ids=str
)
def test_a_run_of_buckets_that_is_none_is_refused(node: TreeNode) -> None:
    """The last one reaches from rounded buckets into others."""
    played = Played("bf16")
    played.values.want(5, exact=False)
    header = job_header(FrameKind.VALUES, step=5, bucket=TRAINED, node=node, flags=IN_MEMORY, codec=Codec.BF16)

    assert refused(played, header) == ("codec" if node == TreeNode(0, 2) else "node")
    assert not played.values.landing.is_complete


def test_a_run_of_buckets_lands_at_once() -> None:
    played = Played("fp32")
    played.values.want(5, exact=False)
    for index, state in enumerate(played.states):
        held = [span.bucket for span in state.spans if span.num_words]
        for first in [bucket for bucket in held if bucket - 1 not in held]:
            count = next(n for n in range(1, 9) if first + n not in held)
            header = job_header(FrameKind.VALUES, step=5, bucket=first, node=TreeNode(first, count), flags=IN_MEMORY)
            played.values.shown(index, header)

    assert played.values.landing.is_complete and played.holds(exact=True)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("windows", [True, False])
def test_nobody_is_warned_of_what_is_meant(windows: bool, codec: CodecName) -> None:
    """What torch warns of once, every trainer of every job would print once."""
    played = Played(codec)
    played.memory = played.values.memory = BucketMemory(LAYOUT, windows=windows)
    played.values.want(5, exact=False)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            played.arrive_all(5, shared=True)
    finally:
        torch.set_warn_always(False)
    assert played.holds(exact=False)


def test_memory_that_is_too_small_for_a_partitions_values_is_refused() -> None:
    played = Played("fp32")
    narrow = PartitionState.empty(LAYOUT, 0, 2, 0, "bf16")
    with pytest.raises(FrameError, match="promised"):
        played.values.map(0, os.dup(narrow.segment.fd))
