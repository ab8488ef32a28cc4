"""The job that is simulated: a small model whose gradients are arithmetic in which the order of additions shows.

Blocks and buckets are made small, so that a model of seventy words lies on three partitions. `reference` says what
every version must be, bit for bit: what one trainer and one partition make of it undisturbed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.codec import as_bytes
from pscluster.step.layout import Layout, TensorSpec
from pscluster.step.tree import Summary, TreeNode, touched_bits
from pscluster.storage.snapshot import PieceKey

BLOCK_WORDS = 16
BUCKET_WORDS = 48
MOST_STEPS = 8
SLOTS = 2  # of every node: trainers or partitions that it takes at once
W, B, MEAN, COUNT, FIXED = range(5)
LAYOUT = Layout(
    (
        TensorSpec(names=("w",), shape=(40,), dtype="float32", kind="trained"),
        TensorSpec(names=("b",), shape=(7,), dtype="float32", kind="trained"),
        TensorSpec(names=("mean",), shape=(5,), dtype="float32", kind="averaged"),
        TensorSpec(names=("count",), shape=(), dtype="int64", kind="carried"),
        TensorSpec(names=("fixed",), shape=(3,), dtype="float32", kind="frozen"),
    )
)


def make_spec(name: str, *, shards: int, steps: int, workers: int, partitions: int, **sections: Any) -> JobSpec:
    """A strict job of `shards` shards of one sample each."""
    train = {
        "global_batch": shards,
        "microbatch": 1,
        "max_steps": steps,
        "optimizer": {"name": "adamw", "lr": 0.1},
        "clip_norm": 2.0,
    }
    return parse_spec(
        {
            "name": name,
            "task": {"entrypoint": "simulated:Task"},
            "train": train,
            "workers": {"min": 1, "max": workers},
            "servers": {"partitions": partitions},
            "network": {"transport": "tcp"},
            **sections,
        }
    )


def first_values(flats: Sequence[torch.Tensor]) -> None:
    """Set the memory of a model to its seeded first values."""
    for flat in flats:
        flat.zero_()
    for number, spec in enumerate(LAYOUT.tensors):
        part = tensor_of(flats, number)
        part.copy_(torch.arange(spec.num_words).remainder(11).sub(5) / (3 if spec.dtype == "float32" else 1))


def tensor_of(flats: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    """The words of tensor `number`, without its padding."""
    bucket, offset = LAYOUT.bucket_of[number]
    return flats[bucket][offset : offset + LAYOUT.tensors[number].num_words]


def moves(shard: int) -> bool:
    """Whether a shard touches more than `w`: odd ones leave the rest as it is."""
    return shard % 2 == 0


def gradients(flats: Sequence[torch.Tensor], bucket: int, step: int, shard: int) -> list[torch.Tensor | None]:
    """One microbatch's gradients of a trained bucket."""
    found: list[torch.Tensor | None] = []
    for placed in LAYOUT.buckets[bucket].placed:
        values = tensor_of(flats, placed.tensor)
        ramp = torch.arange(values.numel()).remainder(7).sub(3.0)
        gradient = values * (0.25 + shard / 8) + ramp * (1 + shard / 3) + step / 7
        found.append(gradient if moves(shard) or placed.tensor == W else None)
    return found


def buffer_words(flats: Sequence[torch.Tensor], shard: int) -> torch.Tensor | None:
    """One microbatch's weighted averaged bucket; None: it did not move."""
    if not moves(shard):
        return None
    words = torch.zeros(LAYOUT.buckets[LAYOUT.bucket_of[MEAN][0]].num_words)
    words[:5] = (tensor_of(flats, MEAN) * 0.75 + shard / 3) * weight_of(shard)
    return words


def carried_words(flats: Sequence[torch.Tensor]) -> torch.Tensor:
    """What shard 0 makes of the carried bucket."""
    words = flats[LAYOUT.bucket_of[COUNT][0]].clone()
    words[0] += 1
    return words


def weight_of(shard: int) -> float:
    return 1.0 + shard


def tally_of(shards: int) -> float:
    """What the samples of all shards add up to when each was added once, and no other number of times."""
    return float(2**shards - 1)


def summary(flats: Sequence[torch.Tensor], shard: int) -> Summary:
    """One microbatch's summary. Its "samples" is a power of two of its own."""
    touched = [W, B, MEAN] if moves(shard) else [W]
    loss = float(tensor_of(flats, W).double().square().sum()) * weight_of(shard)
    return Summary(
        loss_sum=loss,
        weight=weight_of(shard),
        samples=float(2**shard),
        touched=touched_bits(touched, len(LAYOUT.tensors)),
    )


def digest(flats: Sequence[torch.Tensor]) -> str:
    """Of a whole model's memory."""
    return hashlib.sha256(b"".join(bytes(as_bytes(flat)) for flat in flats)).hexdigest()


@dataclass
class Reference:
    """What each version of a job is, whoever makes it: its pieces as a snapshot holds them, ages, digest of the
    values, and the loss of the step that led to it."""

    pieces: dict[int, dict[PieceKey, bytes]] = field(default_factory=dict)
    update_counts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    def values(self, version: int) -> list[bytes]:
        """Each bucket's words."""
        return [self.pieces[version][bucket.index, "values"] for bucket in LAYOUT.buckets]

    def digest(self, version: int) -> str:
        return hashlib.sha256(b"".join(self.values(version))).hexdigest()


def part_of(whole: bytes, partition: int, num_partitions: int, bucket: int) -> bytes:
    """A partition's span of a bucket's piece."""
    span = LAYOUT.span(bucket, partition, num_partitions)
    return whole[4 * span.start : 4 * span.stop]


def leaf(shard: int) -> TreeNode:
    return TreeNode(shard, 1)
