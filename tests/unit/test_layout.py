"""Where tensors live: padded buckets, blocks, partitions; the layout as JSON; what differs, by name."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pscluster.errors import LayoutError
from pscluster.step.layout import BLOCK_WORDS, BUCKET_WORDS, ITEM_BYTES, KINDS, PAD_WORDS, Layout, TensorSpec


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Up to 12 tensors of any kind, up to a few buckets' size; integers in carried and frozen buckets only."""
    tensors = []
    for number in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(KINDS))
        dtype = "float32" if kind in ("trained", "averaged") else draw(st.sampled_from(sorted(ITEM_BYTES)))
        rows = draw(st.sampled_from([0, 1, 3, 17, 1000, BLOCK_WORDS // 64, BLOCK_WORDS // 64 + 1, BUCKET_WORDS // 100]))
        shape = draw(st.sampled_from([(rows,), (rows, 64), (rows, 7, 9), ()]))
        names = (f"t{number}", f"tied{number}") if draw(st.booleans()) else (f"t{number}",)
        decay, persistent = draw(st.booleans()), draw(st.booleans())
        tensors.append(TensorSpec(names=names, shape=shape, dtype=dtype, kind=kind, decay=decay, persistent=persistent))
    return Layout(tuple(tensors))


def tensor(name: str = "w", shape: tuple[int, ...] = (4,), **fields: Any) -> TensorSpec:
    return TensorSpec(names=(name,), shape=shape, dtype="float32", kind="trained", **fields)


@settings(max_examples=60)
@given(layout=layouts())
def test_every_tensor_lies_padded_and_alone_in_a_bucket_of_its_kind(layout: Layout) -> None:
    placed = [p.tensor for bucket in layout.buckets for p in bucket.placed]
    assert len(set(placed)) == len(placed)
    assert set(range(len(layout.tensors))) - set(placed) <= {
        n for n, t in enumerate(layout.tensors) if not t.num_elements
    }
    for bucket in layout.buckets:
        end = 0
        for place in bucket.placed:
            spec = layout.tensors[place.tensor]
            assert spec.kind == bucket.kind
            assert place.offset == end and place.offset % PAD_WORDS == 0
            assert layout.bucket_of[place.tensor] == (bucket.index, place.offset)
            end = place.offset + -(-spec.num_words // PAD_WORDS) * PAD_WORDS
        assert 0 < end == bucket.num_words
        before_last = bucket.placed[-1].offset
        assert before_last < BUCKET_WORDS, "a bucket is closed once it is full"


@settings(max_examples=60)
@given(layout=layouts())
def test_buckets_come_by_kind_in_the_models_order_and_blocks_are_counted_over_all(layout: Layout) -> None:
    kinds = [KINDS.index(bucket.kind) for bucket in layout.buckets]
    assert kinds == sorted(kinds)
    for kind in KINDS:
        order = [p.tensor for b in layout.buckets if b.kind == kind for p in b.placed]
        assert order == sorted(order)
    blocks = [block for b in layout.buckets for block in range(b.first_block, b.first_block + b.num_blocks)]
    assert blocks == list(range(len(blocks)))


@settings(max_examples=60)
@given(layout=layouts(), num_partitions=st.integers(1, 7))
def test_the_spans_of_all_partitions_tile_each_bucket_on_block_boundaries(layout: Layout, num_partitions: int) -> None:
    held = [layout.spans(partition, num_partitions) for partition in range(num_partitions)]
    for bucket in layout.buckets:
        spans = sorted((h[bucket.index] for h in held), key=lambda span: (span.start, span.stop))
        assert all(span.bucket == bucket.index for span in spans)
        spans = [span for span in spans if span.num_words]
        assert spans[0].start == 0 and spans[-1].stop == bucket.num_words
        for one, following in itertools.pairwise(spans):
            assert one.stop == following.start
        for span in spans:
            assert span.start % BLOCK_WORDS == 0
            assert span.first_block == bucket.first_block + span.start // BLOCK_WORDS
        blocks = [-(-span.num_words // BLOCK_WORDS) for span in spans]
        blocks += [0] * (num_partitions - len(blocks))
        assert max(blocks) - min(blocks) <= 1, "an even deal"


@settings(max_examples=60)
@given(layout=layouts(), num_partitions=st.integers(1, 7))
def test_of_a_span_only_trained_words_travel_narrow_and_only_they_have_gradients(
    layout: Layout, num_partitions: int
) -> None:
    for partition in range(num_partitions):
        spans = layout.spans(partition, num_partitions)
        for codec, trained_bytes in (("fp32", 4), ("bf16", 2)):
            gradients = layout.gradient_bytes(spans, codec)  # type: ignore[arg-type]
            for span, gradient in zip(spans, gradients, strict=True):
                trained = layout.buckets[span.bucket].kind == "trained"
                wire = layout.wire_bytes(span, codec)  # type: ignore[arg-type]
                assert wire == span.num_words * (trained_bytes if trained else 4)
                assert gradient == (wire if trained else 0)
                assert codec != "fp32" or wire == span.size_bytes


def test_small_buckets_do_not_all_fall_to_one_partition() -> None:
    big = [tensor(f"w{i}", (BUCKET_WORDS,)) for i in range(4)]
    layout = Layout((*big, *[replace(tensor(f"b{i}"), kind=kind) for i, kind in enumerate(KINDS[1:])]))
    small = [layout.spans(p, 3) for p in range(3)]

    assert [sum(bool(s.num_words) for s in spans[4:]) for spans in small] == [1, 1, 1]


@settings(max_examples=60)
@given(layout=layouts())
def test_a_layout_reads_back_from_json_with_the_same_digest(layout: Layout) -> None:
    again = Layout.from_json(layout.to_json())

    assert again == layout
    assert again.to_json() == layout.to_json()
    assert again.sha256 == layout.sha256


def _edited(edit: Any) -> bytes:
    data = json.loads(Layout((tensor(),)).to_json())
    edit(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 5000,
        _edited(lambda d: d.update(format=2)),
        _edited(lambda d: d.update(tensors=3)),
        _edited(lambda d: d["tensors"].append("w")),
        _edited(lambda d: d["tensors"][0].update(kind="other")),
        _edited(lambda d: d["tensors"][0].update(dtype="complex64")),
        _edited(lambda d: d["tensors"][0].update(shape=[-1])),
        _edited(lambda d: d["tensors"][0].update(shape=[1.5])),
        _edited(lambda d: d["tensors"][0].update(shape=[True])),
        _edited(lambda d: d["tensors"][0].update(shape="4")),
        _edited(lambda d: d["tensors"][0].update(names=[])),
        _edited(lambda d: d["tensors"][0].update(names=[3])),
        _edited(lambda d: d["tensors"][0].update(decay="yes")),
        _edited(lambda d: d["tensors"][0].update(colour=1)),
        _edited(lambda d: d["tensors"][0].pop("names")),
    ],
)
def test_what_is_no_layout_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(LayoutError):
        Layout.from_json(data)


OURS = Layout((tensor("a"), tensor("b", (2, 3), decay=True)))


@settings(max_examples=60)
@given(ours=layouts(), theirs=layouts())
def test_layouts_that_differ_have_different_digests(ours: Layout, theirs: Layout) -> None:
    assert (ours.sha256 == theirs.sha256) == (ours == theirs)


def test_the_digest_of_a_layout_does_not_change_by_accident() -> None:
    """It is written in snapshots and compared between versions."""
    assert OURS.sha256 == "b0551181c462f6e12fccd2f952e56dcab14ac4bc96a4c1f8bcc48934553d1198"


@pytest.mark.parametrize(("dtype", "elements", "words"), [("bool", 5, 2), ("int64", 3, 6), ("bfloat16", 3, 2)])
def test_raw_tensors_fill_whole_words(dtype: str, elements: int, words: int) -> None:
    assert replace(tensor(shape=(elements,)), dtype=dtype, kind="frozen").num_words == words
