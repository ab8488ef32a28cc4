"""Which samples a shard takes in a step: a pure function of (seed, data set length, D, microbatch).

An epoch is a seeded permutation of the data set, cut into runs of `microbatch` samples for the shards of successive
steps. Any worker can compute the samples of any (step, shard), in constant memory, for any number of workers."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from hashlib import blake2b

_WORD = 0xFFFF_FFFF_FFFF_FFFF
_NUM_KEYS = 6


class Permutation:
    """A keyed bijection of range(n), n >= 1, one index at a time: `permutation[i]`. `key` is 48 bytes.

    A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002) over Z_a x Z_b, a *
    b the smallest such product not below n and a near its root; values above n, fewer than a, are mapped again."""

    __slots__ = ("_columns", "_keys", "_rows", "n")

    def __init__(self, n: int, key: bytes) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs n >= 1, not {n}")
        self.n = n
        self._rows = math.isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)
        self._keys: tuple[int, ...] = struct.unpack(f"<{_NUM_KEYS}Q", key)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        """Where `index` goes. Takes a few microseconds. Raises IndexError outside range(n)."""
        if not 0 <= index < self.n:
            raise IndexError(f"{index} is not in range({self.n})")
        value = self._once(index)
        while value >= self.n:
            value = self._once(value)
        return value

    def _once(self, value: int) -> int:
        rows, columns = self._rows, self._columns
        right, left = divmod(value, rows)
        k0, k1, k2, k3, k4, k5 = self._keys
        left = (left + _mix(right, k0)) % rows
        right = (right + _mix(left, k1)) % columns
        left = (left + _mix(right, k2)) % rows
        right = (right + _mix(left, k3)) % columns
        left = (left + _mix(right, k4)) % rows
        right = (right + _mix(left, k5)) % columns
        return right * rows + left


def _mix(value: int, key: int) -> int:
    """64 keyed pseudo-random bits (the finaliser of MurmurHash3)."""
    value = (value ^ key) & _WORD
    value = ((value ^ (value >> 33)) * 0xFF51AFD7ED558CCD) & _WORD
    value = ((value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53) & _WORD
    return value ^ (value >> 33)


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> Permutation:
    """The order of the samples in one epoch. The key is a hash that is the same on every Python version and machine."""
    packed = struct.pack("<QQ", seed, epoch)
    return Permutation(num_samples, blake2b(packed, digest_size=8 * _NUM_KEYS, person=b"ps-epoch-order").digest())


class ShardSampler:
    """Assigns every sample of an epoch to exactly one (step, shard). The last step of an epoch may be short: its later
    shards then get shorter or empty lists. Not thread-safe."""

    def __init__(self, num_samples: int, num_shards: int, microbatch: int, seed: int) -> None:
        if min(num_samples, num_shards, microbatch) < 1:
            raise ValueError(f"{num_samples=}, {num_shards=}, {microbatch=}: each must be above 0")
        self.num_samples = num_samples
        self.num_shards = num_shards
        self.microbatch = microbatch
        self.seed = seed
        self._epoch = -1
        self._order = Permutation(1, bytes(8 * _NUM_KEYS))

    @property
    def steps_per_epoch(self) -> int:
        """How many steps use every sample once."""
        return -(-self.num_samples // (self.num_shards * self.microbatch))

    def indices(self, step: int, shard: int) -> list[int]:
        """The at most `microbatch` samples of `shard` in the step that starts from version `step` (0-based)."""
        if step < 0 or not 0 <= shard < self.num_shards:
            raise IndexError(f"no shard {shard} of {self.num_shards} in step {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_permutation(self.num_samples, self.seed, epoch)
            self._epoch = epoch
        first = (position * self.num_shards + shard) * self.microbatch
        order = self._order
        return [order[i] for i in range(first, min(first + self.microbatch, self.num_samples))]

    def final_step(self, max_steps: int | None, epochs: int | None) -> int:
        """The version at which training ends; with both limits, whichever comes first."""
        limits = [] if max_steps is None else [max_steps]
        if epochs is not None:
            limits.append(epochs * self.steps_per_epoch)
        if not limits:
            raise ValueError("one of max_steps and epochs is needed")
        return min(limits)


def eval_batches(num_samples: int, num_shards: int, microbatch: int, shard: int) -> Iterator[range]:
    """The held-out samples that `shard` evaluates: the j-th run of `microbatch` goes to shard j mod D."""
    if not 0 <= shard < num_shards:
        raise IndexError(f"no shard {shard} of {num_shards}")
    for first in range(shard * microbatch, num_samples, num_shards * microbatch):
        yield range(first, min(first + microbatch, num_samples))
