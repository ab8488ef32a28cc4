"""What a partition holds: taken from a snapshot whole, or not at all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.held_pieces import write_part
from pscluster.errors import FrameError, StorageError
from pscluster.step.codec import as_bytes
from pscluster.step.layout import BLOCK_WORDS, Codec, Layout, TensorSpec
from pscluster.storage import Buffer
from pscluster.storage.snapshot import PartMeta, PieceKey
from pscluster.wire.memory import Segment, page_offsets
from psserver.partition.step.state import PartitionState

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(BLOCK_WORDS + 5,), dtype="float32", kind="trained"),
        TensorSpec(names=("n",), shape=(), dtype="int64", kind="carried"),
        TensorSpec(names=("m",), shape=(3,), dtype="float32", kind="averaged"),
    )
)


def drawn(partition: int = 0, count: int = 2, moments: int = 2, seed: int = 1, codec: Codec = "fp32") -> PartitionState:
    """A state with random content."""
    state = PartitionState.empty(LAYOUT, partition, count, moments, codec)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*state.values, *(m for per_bucket in state.moments for m in per_bucket)):
        tensor.copy_(torch.randint(-1000, 1000, tensor.shape, generator=generator))
    state.update_counts = [5, 0, 2]
    return state


def save(state: PartitionState, path: Path, *, partition: int = 0, count: int = 2, step: int = 9) -> Path:
    write_part(path, state.meta("job", step, 1, partition, count), state.layout, state.pieces())
    return path


CODECS: list[Codec] = ["fp32", "bf16"]


def assert_published(state: PartitionState) -> None:
    """What trainers read is what is held, rounded once where the codec says so."""
    for published, values in zip(state.published, state.values, strict=True):
        assert torch.equal(published, values.to(published.dtype))


def content(state: PartitionState) -> list[bytes]:
    tensors = [*state.values, *(m for per_bucket in state.moments for m in per_bucket)]
    return [bytes(as_bytes(tensor)) for tensor in tensors]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("partition", [0, 1])
def test_a_state_comes_back_from_its_part(partition: int, codec: Codec, tmp_path: Path) -> None:
    state = drawn(partition)
    path = save(state, tmp_path / "part", partition=partition)
    other = PartitionState.empty(LAYOUT, partition, 2, 2, codec)
    assert not other.is_filled

    other.load(path, partition, 2, 9)

    assert content(other) == content(state)
    assert other.update_counts == [5, 0, 2]
    assert other.is_filled
    assert_published(other)


def test_the_copy_for_a_snapshot_is_private() -> None:
    state = drawn()
    pieces = state.pieces()
    before = {key: bytes(data) for key, data in pieces.items()}
    for values in state.values:
        values.zero_()

    assert {key: bytes(data) for key, data in pieces.items()} == before


def test_only_trained_buckets_have_moments() -> None:
    state = PartitionState.empty(LAYOUT, 0, 1, 2)

    assert [len(moments) for moments in state.moments] == [2, 0, 0]
    assert state.size_bytes == 4 * (3 * (BLOCK_WORDS + 16) + 16 + 16)


# ---- what trainers read ----


def read(state: PartitionState, codec: Codec) -> tuple[list[bytes], Segment]:
    """Each bucket as somebody else finds it who maps the memory, by what the layout alone says."""
    offsets, size = page_offsets(LAYOUT.wire_bytes(span, codec) for span in state.spans)
    segment = Segment.open(os.dup(state.segment.fd), size, writable=False)
    ends = [at + LAYOUT.wire_bytes(span, codec) for span, at in zip(state.spans, offsets, strict=True)]
    return [bytes(segment.view[at:end]) for at, end in zip(offsets, ends, strict=True)], segment


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("partition", [0, 1, 2])
def test_what_is_published_lies_in_the_shared_memory(partition: int, codec: Codec) -> None:
    state = drawn(partition, 3, codec=codec)
    for span in state.spans:
        state.publish(span.bucket)
    found, _ = read(state, codec)

    assert_published(state)
    assert found == [bytes(as_bytes(published)) for published in state.published]
    assert [published.dtype for published in state.published] == [
        torch.bfloat16 if codec == "bf16" else torch.float32, torch.float32, torch.int32,
    ]  # fmt: skip


def test_without_rounding_what_is_held_is_what_is_published() -> None:
    """No copy: an update is seen at once, and costs no memory twice."""
    state = drawn()
    for published, values in zip(state.published, state.values, strict=True):
        assert published is values
    state.values[0].fill_(7.0)

    assert torch.frombuffer(bytearray(read(state, "fp32")[0][0]), dtype=torch.float32).unique().tolist() == [7.0]
    narrow = PartitionState.empty(LAYOUT, 0, 2, 2, "bf16")
    assert narrow.size_bytes - state.size_bytes == 2 * state.spans[0].num_words, "of the trained bucket"


def test_rounded_values_are_published_when_told() -> None:
    state = drawn(codec="bf16")
    state.values[0].fill_(1 / 3)
    assert not state.published[0].any()
    state.publish(0)

    assert state.published[0].unique().tolist() == [torch.tensor(1 / 3).bfloat16().item()]
    assert state.values[0].unique().tolist() == [torch.tensor(1 / 3).item()], "what is held is exact"


def test_rounding_is_to_the_nearest_even() -> None:
    state = drawn(codec="bf16")
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, float("inf"), 3.4e38])
    state.values[0][:6] = halves
    state.publish(0)

    assert state.published[0][:6].tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7, float("inf"), float("inf")]


def test_who_reads_cannot_write() -> None:
    state = drawn()
    with pytest.raises(FrameError, match="cannot be mapped"):
        Segment.open(os.dup(state.segment.fd), 1, writable=True)
    _, segment = read(state, "fp32")
    assert segment.view.readonly


def _meta(state: PartitionState) -> PartMeta:
    return state.meta("job", 9, 1, 0, 2)


def _without(pieces: dict[PieceKey, Buffer], *gone: PieceKey) -> dict[PieceKey, Buffer]:
    return {key: data for key, data in pieces.items() if key not in gone}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"partition": 1}, "partition 1 of 2 at step 9, not 0 of 2"),
        ({"num_partitions": 3}, "partition 0 of 3"),
        ({"step": 8}, "at step 8, not"),
    ],
)
def test_a_part_of_somebody_else_is_refused(change: dict[str, int], said: str, tmp_path: Path) -> None:
    state, path = drawn(), tmp_path / "part"
    write_part(path, replace(_meta(state), **change), LAYOUT, state.pieces())  # type: ignore[arg-type]

    with pytest.raises(StorageError, match=said):
        state.load(path, 0, 2, 9)


def test_a_part_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """Another model, another optimizer, a piece too short: each is refused before a byte is taken."""
    state, path = drawn(), tmp_path / "part"
    fits = drawn(seed=2).pieces()
    other = Layout((*LAYOUT.tensors[:2], replace(LAYOUT.tensors[2], names=("v",))))
    short = {key: (data if key[1] != "moment1" else bytes(data)[:-4]) for key, data in fits.items()}
    before = content(state)
    for layout, pieces, said in [
        (other, fits, "another model"),
        (LAYOUT, _without(fits, (0, "moment1")), "another optimizer"),
        (LAYOUT, {**fits, (0, "moment2"): b""}, "another optimizer"),
        (LAYOUT, short, "wrong length"),
    ]:
        write_part(path, _meta(state), layout, pieces)
        with pytest.raises(StorageError, match=said):
            state.load(path, 0, 2, 9)
    assert content(state) == before
    assert state.update_counts == [5, 0, 2]


def test_a_reset_forgets_what_training_made() -> None:
    state = drawn()
    state.filled = {0, 1, 2}
    state.reset()

    assert state.update_counts == [0, 0, 0]
    assert not state.is_filled
    assert all(not moment.any() for per_bucket in state.moments for moment in per_bucket)


def test_a_partition_without_a_word_of_the_model_is_filled_from_the_start() -> None:
    assert PartitionState.empty(LAYOUT, 4, 7, 2).is_filled == all(not s.num_words for s in LAYOUT.spans(4, 7))
    assert any(PartitionState.empty(LAYOUT, p, 7, 2).is_filled for p in range(7))


def test_bytes_are_shared_with_the_tensor() -> None:
    tensor = torch.zeros(2)
    as_bytes(tensor)[:4] = bytes.fromhex("0000803f")

    assert tensor.tolist() == [1.0, 0.0]
    assert as_bytes(torch.zeros(0)).nbytes == 0
