"""What a partition holds: taken from a snapshot whole, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pscluster.errors import StorageError
from pscluster.layout import BLOCK_WORDS, Layout, TensorSpec
from pscluster.snapshot import Buffer, PartMeta, PieceKey, write_part
from psserver.partition.state import PartitionState, as_bytes

LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(BLOCK_WORDS + 5,), dtype="float32", kind="trained"),
        TensorSpec(names=("n",), shape=(), dtype="int64", kind="carried"),
        TensorSpec(names=("m",), shape=(3,), dtype="float32", kind="averaged"),
    )
)


def drawn(partition: int = 0, count: int = 2, moments: int = 2, seed: int = 1) -> PartitionState:
    """A state with random content."""
    state = PartitionState.empty(LAYOUT, partition, count, moments)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*state.values, *(m for per_bucket in state.moments for m in per_bucket)):
        tensor.copy_(torch.randint(-1000, 1000, tensor.shape, generator=generator))
    state.ages = [5, 0, 2]
    return state


def save(state: PartitionState, path: Path, *, partition: int = 0, count: int = 2, step: int = 9) -> Path:
    write_part(path, state.meta("job", step, 1, partition, count), state.layout, state.pieces())
    return path


def content(state: PartitionState) -> list[bytes]:
    tensors = [*state.values, *(m for per_bucket in state.moments for m in per_bucket)]
    return [bytes(as_bytes(tensor)) for tensor in tensors]


@pytest.mark.parametrize("partition", [0, 1])
def test_a_state_comes_back_from_its_part(partition: int, tmp_path: Path) -> None:
    state = drawn(partition)
    path = save(state, tmp_path / "part", partition=partition)
    other = PartitionState.empty(LAYOUT, partition, 2, 2)
    assert not other.is_filled

    other.load(path, partition, 2, 9)

    assert content(other) == content(state)
    assert other.ages == [5, 0, 2]
    assert other.is_filled


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
    assert state.ages == [5, 0, 2]


def test_a_reset_forgets_what_training_made() -> None:
    state = drawn()
    state.filled = {0, 1, 2}
    state.reset()

    assert state.ages == [0, 0, 0]
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
