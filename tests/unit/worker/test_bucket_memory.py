"""A replica's memory: the same tensors over private words and over windows onto what a partition holds."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pscluster.job.optimizer import OptimizerSection
from pscluster.step.layout import BLOCK_WORDS, Layout, Span, TensorSpec
from pscluster.wire.memory import PAGE_BYTES, Segment
from psserver.partition.step.state import PartitionState
from psworker.replica import BucketMemory, Replica

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(3 * BLOCK_WORDS + 5,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(3,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
    )
)


def segment_of(value: float, num_words: int = 4 * BLOCK_WORDS) -> Segment:
    segment = Segment.create(4 * num_words, writable_by_others=False)
    torch.frombuffer(segment.view, dtype=torch.float32).fill_(value)
    return segment


def test_new_memory_is_private_zeroed_and_of_each_kinds_type() -> None:
    memory = BucketMemory(LAYOUT)

    assert [flat.dtype for flat in memory.flats] == [torch.float32, torch.float32, torch.int32]
    assert [flat.numel() for flat in memory.flats] == [b.num_words for b in LAYOUT.buckets]
    assert not any(flat.any() for flat in memory.flats)
    assert all(flat.data_ptr() % PAGE_BYTES == 0 for flat in memory.flats)


def test_a_span_that_is_shown_follows_the_partition_and_the_rest_is_private() -> None:
    memory, span = BucketMemory(LAYOUT), LAYOUT.span(0, 1, 2)
    addresses = [flat.data_ptr() for flat in memory.flats]
    memory.flats[0].fill_(1.0)
    segment = segment_of(5.0)
    memory.show(span, segment, PAGE_BYTES)

    assert memory.words(span).unique().tolist() == [5.0]
    assert memory.flats[0][: span.start].unique().tolist() == [1.0]
    torch.frombuffer(segment.view, dtype=torch.float32).fill_(6.0)
    assert memory.words(span).unique().tolist() == [6.0], "what comes later, too"
    assert [flat.data_ptr() for flat in memory.flats] == addresses


def test_before_it_is_written_to_a_window_is_closed() -> None:
    memory, span, segment = BucketMemory(LAYOUT), LAYOUT.span(0, 0, 2), segment_of(5.0)
    memory.show(span, segment, 0)
    memory.writable(span).fill_(2.0)

    assert memory.words(span).unique().tolist() == [2.0]
    assert torch.frombuffer(segment.view, dtype=torch.float32).unique().tolist() == [5.0]
    memory.writable(span)[0] = 3.0
    assert memory.words(span)[:2].tolist() == [3.0, 2.0], "what is private already keeps its content"
    memory.show(span, segment, 0)
    assert memory.words(span).unique().tolist() == [5.0], "and is a window again when it is shown again"


def test_a_window_onto_another_segment_takes_the_place_of_the_old_one() -> None:
    """The partition was replaced. The old segment is held by nothing any more."""
    memory, span = BucketMemory(LAYOUT), LAYOUT.span(0, 0, 1)
    first, second = segment_of(5.0), segment_of(6.0)
    memory.show(span, first, 0)
    number = first.fd
    memory.show(span, second, 0)
    del first

    assert memory.words(span).unique().tolist() == [6.0]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_closing_all_windows_leaves_zeroed_private_memory() -> None:
    memory, segment = BucketMemory(LAYOUT), segment_of(5.0)
    for partition in range(2):
        memory.show(LAYOUT.span(0, partition, 2), segment, 0)
    memory.close_windows()
    for flat in memory.flats:
        assert not flat.any()
        flat.fill_(1)

    assert torch.frombuffer(segment.view, dtype=torch.float32).unique().tolist() == [5.0]


def test_memory_that_may_have_no_windows_keeps_its_pages() -> None:
    memory, span = BucketMemory(LAYOUT, windows=False), LAYOUT.span(0, 1, 2)
    memory.writable(span).fill_(7.0)
    memory.close_windows()

    assert not memory.may_window
    assert memory.words(span).unique().tolist() == [7.0]


SHOW = st.tuples(st.just("show"), st.integers(0, 2), st.integers(0, 1))
WRITE = st.tuples(st.just("write"), st.integers(0, 2), st.integers(1, 9))


@settings(max_examples=50)
@given(acts=st.lists(st.one_of(SHOW, WRITE), max_size=20))
def test_whatever_comes_by_either_way_the_last_word_counts(acts: list[tuple[str, int, int]]) -> None:
    """Three partitions' spans of one bucket; two segments that change all the while."""
    memory = BucketMemory(LAYOUT)
    spans: list[Span] = [LAYOUT.span(0, partition, 3) for partition in range(3)]
    segments = [segment_of(100.0), segment_of(200.0)]
    model: list[tuple[int | None, float]] = [(None, 0.0)] * 3
    for act, place, number in acts:
        if act == "show":
            memory.show(spans[place], segments[number], 0)
            model[place] = (number, 0.0)
        else:
            memory.writable(spans[place]).fill_(number)
            model[place] = (None, float(number))
        for segment in segments:
            torch.frombuffer(segment.view, dtype=torch.float32).add_(1.0)
    for span, (source, value) in zip(spans, model, strict=True):
        base = 100.0 * (source + 1) + len(acts) if source is not None else value
        assert memory.words(span).unique().tolist() == [base]


def test_parameters_are_what_the_partition_holds_without_a_copy() -> None:
    """Forward and backward through windows; the gradients are the model's own."""
    torch.manual_seed(0)
    plain = nn.Linear(200, 200)
    replica = Replica(nn.Linear(200, 200), OptimizerSection())
    state = PartitionState.empty(replica.layout, 0, 1, 0)
    for number, parameter in enumerate(plain.parameters()):
        bucket, offset = replica.layout.bucket_of[number]
        state.values[bucket][offset : offset + parameter.numel()] = parameter.detach().reshape(-1)
    replica.memory.show(state.spans[0], state.segment, 0)
    batch = torch.randn(3, 200)

    assert torch.equal(replica.model(batch), plain(batch))
    for model in (replica.model, plain):
        model(batch).square().sum().backward()
    for mine, other in zip(replica.model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.equal(mine.grad, other.grad)
    state.values[0].zero_()
    assert not replica.model(batch).any()
