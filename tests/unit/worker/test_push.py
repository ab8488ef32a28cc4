"""From gradients to a partition's words: the same ones, sent from where they lie or written somewhere else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pscluster.step.codec import as_bytes
from pscluster.step.layout import BLOCK_WORDS, Layout, Span, TensorSpec
from psworker.trainer.gradients.accumulate import Gradients
from psworker.trainer.gradients.push import cut, gather, write

SHAPES = ((5,), (4, 8), (), (0, 3), (1,), (16,), (3, 1, 11), (0,), (2,))
LAYOUT = Layout(
    tuple(TensorSpec(names=(f"w{n}",), shape=shape, dtype="float32", kind="trained") for n, shape in enumerate(SHAPES))
)
BUCKET = LAYOUT.buckets[0]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def drawn(touched: list[bool], dtype: torch.dtype, *, transposed: bool = False) -> Gradients:
    """A gradient for each placed tensor that was touched; numbers tell tensors and elements apart."""
    found: Gradients = []
    for placed, hit in zip(BUCKET.placed, touched, strict=True):
        shape = LAYOUT.tensors[placed.tensor].shape
        numbers = torch.arange(LAYOUT.tensors[placed.tensor].num_elements, dtype=torch.float32) + 1
        gradient = (numbers * (placed.tensor + 1)).reshape(shape).to(dtype)
        if transposed and gradient.dim() > 1:
            gradient = gradient.transpose(0, -1).contiguous().transpose(0, -1)
        found.append(gradient if hit else None)
    return found


def by_hand(gradients: Gradients, dtype: torch.dtype) -> torch.Tensor:
    words = torch.zeros(BUCKET.num_words, dtype=dtype)
    for placed, gradient in zip(BUCKET.placed, gradients, strict=True):
        if gradient is not None:
            flat = [float(x) for x in np.ravel(gradient.float().numpy())]
            words[placed.offset : placed.offset + len(flat)] = torch.tensor(flat).to(dtype)
    return words


def copied(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


@given(
    touched=st.lists(st.booleans(), min_size=len(BUCKET.placed), max_size=len(BUCKET.placed)),
    ends=st.tuples(st.integers(0, BUCKET.num_words), st.integers(0, BUCKET.num_words)),
    dtype=DTYPES,
    transposed=st.booleans(),
    dirt=st.sampled_from([0.0, 7.0, float("nan")]),
)
def test_what_is_sent_and_what_is_written_are_the_spans_words(
    touched: list[bool], ends: tuple[int, int], dtype: torch.dtype, transposed: bool, dirt: float
) -> None:
    gradients = drawn(touched, dtype, transposed=transposed)
    span = Span(0, min(ends), max(ends), 0)
    expected = by_hand(gradients, dtype)[span.start : span.stop]
    pieces = gather(LAYOUT, 0, gradients)
    target = torch.full((span.num_words,), dirt, dtype=dtype)

    write(pieces, span, target, copied)
    sent = b"".join(bytes(memoryview(part).cast("B")) for part in cut(pieces, span, dtype.itemsize))

    assert as_bytes(target).tobytes() == as_bytes(expected.clone()).tobytes() == sent


@given(
    touched=st.lists(st.booleans(), min_size=len(BUCKET.placed), max_size=len(BUCKET.placed)),
    cuts=st.lists(st.integers(0, BUCKET.num_words), max_size=4),
)
def test_the_parts_of_all_partitions_are_the_whole(touched: list[bool], cuts: list[int]) -> None:
    pieces = gather(LAYOUT, 0, drawn(touched, torch.float32))
    ends = [0, *sorted(cuts), BUCKET.num_words]
    parts = [cut(pieces, Span(0, start, stop, 0), 4) for start, stop in itertools.pairwise(ends)]

    whole = cut(pieces, LAYOUT.span(0, 0, 1), 4)
    assert b"".join(bytes(memoryview(b)) for part in parts for b in part) == b"".join(
        bytes(memoryview(b)) for b in whole
    )


def test_what_is_sent_shares_the_gradients_memory() -> None:
    gradient = torch.ones(16)
    gradients: Gradients = [gradient if LAYOUT.tensors[p.tensor].shape == (16,) else None for p in BUCKET.placed]
    before, body, after = cut(gather(LAYOUT, 0, gradients), LAYOUT.span(0, 0, 1), 4)
    gradient.fill_(2.0)

    assert bytes(memoryview(body)) == np.full(16, 2.0, dtype="<f4").tobytes()
    assert not any(memoryview(before).cast("B")) and not any(memoryview(after).cast("B"))


def test_a_gradient_over_several_partitions_is_cut_where_they_begin() -> None:
    layout = Layout((TensorSpec(names=("w",), shape=(2 * BLOCK_WORDS + 5,), dtype="float32", kind="trained"),))
    gradient = torch.arange(2.0 * BLOCK_WORDS + 5)
    pieces = gather(layout, 0, [gradient])
    spans = [layout.span(0, index, 3) for index in range(3)]
    targets = [torch.full((span.num_words,), -1.0) for span in spans]
    for span, target in zip(spans, targets, strict=True):
        write(pieces, span, target, copied)

    joined = torch.cat([target for _, target in sorted(zip((s.start for s in spans), targets, strict=True))])
    assert torch.equal(joined[: gradient.numel()], gradient)
    assert not joined[gradient.numel() :].any()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_untouched_buckets_are_zeros_and_autograd_is_left_out(requires_grad: bool) -> None:
    gradients: Gradients = [None] * len(BUCKET.placed)
    assert gather(LAYOUT, 0, gradients) == []
    gradients[0] = torch.ones(5, requires_grad=requires_grad)
    ((start, stop, words),) = gather(LAYOUT, 0, gradients)
    assert (start, stop, words.requires_grad) == (0, 5, False)
