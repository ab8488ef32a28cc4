"""From (step, shard) to a batch, and to the random numbers that go with it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import crc32c
import numpy as np
import torch

from pscluster.errors import DataError
from pscluster.job.spec import JobSpec
from pscluster.step.sampling import ShardSampler, eval_batches
from pscluster.task import MapDataset
from psworker.trainer.data.loading import user_code


@dataclass
class Batches:
    """The training microbatches of a job. Stateless but for a cache of one epoch's order."""

    dataset: MapDataset
    collate: Callable[[Sequence[Any]], Any]
    sampler: ShardSampler
    seed: int

    def microbatch(self, step: int, shard: int) -> tuple[Any | None, int]:
        """(batch, number of samples in it) of `shard` in the step that starts from version `step`.

        (None, 0) when the short last step of an epoch leaves the shard without samples. The generators are seeded
        twice: for the data, so that augmentation is exact, and again before returning, so that the forward pass draws
        the same numbers however many the data set drew. Blocks as long as the data set does. Raises TaskError or
        DataError with the user's traceback."""
        indices = self.sampler.indices(step, shard)
        return (_batch(self, indices, step, shard, "train_data") if indices else None), len(indices)


@dataclass
class EvalBatches:
    """The held-out batches of a job, assigned to shards: batch j goes to shard j mod D."""

    dataset: MapDataset
    collate: Callable[[Sequence[Any]], Any]
    num_shards: int
    microbatch: int
    seed: int

    def of_shard(self, shard: int) -> Iterator[tuple[Any, int]]:
        """Each (batch, number of samples) of `shard`, in order. The generators are seeded for every batch."""
        for indices in eval_batches(len(self.dataset), self.num_shards, self.microbatch, shard):
            yield _batch(self, indices, indices.start, shard, "eval_data"), len(indices)

    @property
    def num_batches(self) -> int:
        """How many there are; the last has the fewest samples."""
        return -(-len(self.dataset) // self.microbatch)

    def indices(self, number: int) -> range:
        """The samples of batch `number`."""
        first = number * self.microbatch
        return range(first, min(first + self.microbatch, len(self.dataset)))

    def batch(self, number: int) -> tuple[Any, int]:
        """Batch `number` alone, as `of_shard` gives it."""
        indices = self.indices(number)
        return _batch(self, indices, indices.start, number % self.num_shards, "eval_data"), len(indices)


def sampler_of(spec: JobSpec, num_samples: int) -> ShardSampler:
    """The job's assignment of training samples to shards. Raises DataError when too few are left for a microbatch."""
    train = spec.train
    if spec.data.drop_last and num_samples < train.microbatch:
        raise DataError(
            f"train_data() has {num_samples} samples: with data.drop_last they do not fill one microbatch of "
            f"{train.microbatch}",
            action="lower train.microbatch, or set data.drop_last: false",
        )
    return ShardSampler(num_samples, train.num_shards, train.microbatch, train.seed, drop_last=spec.data.drop_last)


def _batch(batches: Batches | EvalBatches, indices: Sequence[int], step: int, shard: int, data: str) -> Any:
    """The collated samples; the generators are seeded before they are read, and again for the forward pass."""
    seed_step(batches.seed, step, -1 - shard)  # of no shard: data and forward pass must not draw the same numbers
    with user_code(f"reading a sample of {data}", data=True):
        samples = [batches.dataset[index] for index in indices]
    with user_code("collate"):
        collated = batches.collate(samples)
    seed_step(batches.seed, step, shard)
    return collated


def seed_step(seed: int, step: int, shard: int) -> None:
    """Seed torch (CPU, and CUDA once it is in use), numpy and `random` for one (step, shard).

    The three get different words of one blake2b digest of the arguments. Cheap enough for every microbatch."""
    digest = blake2b(struct.pack("<Qqq", seed, step, shard), digest_size=32, person=b"ps-step-seed").digest()
    for_torch, for_python, for_numpy, for_cuda = struct.unpack("<QQQQ", digest)
    # Not torch.manual_seed: before CUDA is in use it would format a stack trace at every call.
    torch.default_generator.manual_seed(for_torch >> 1)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(for_cuda >> 1)
    random.seed(for_python)
    np.random.seed([for_numpy & 0xFFFF_FFFF, for_numpy >> 32])


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def generators_checksum() -> int:
    """A checksum of the state of every global generator: equal after equal draws from equal seeds."""
    legacy: Any = np.random.get_state(legacy=False)
    parts = [repr((random.getstate(), legacy["state"]["pos"])).encode(), legacy["state"]["key"].tobytes()]
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _cuda_in_use() else [])]
    return crc32c.crc32c(b"".join([*parts, *(state.numpy().tobytes() for state in states)]))


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put the generators of torch, numpy and `random` back on leaving to where they were on entering."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_cuda = _cuda_in_use()
    cuda = torch.cuda.get_rng_state_all() if on_cuda else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if on_cuda:
            torch.cuda.set_rng_state_all(cuda)


def data_fingerprint(train: MapDataset, held_out: MapDataset | None) -> str:
    """Hex digest of the lengths and of a few samples of both data sets: equal on nodes that hold the same data.

    Reads at most 8 samples of each, at places that depend on the length alone. Leaves the generators as they were."""
    digest = blake2b(digest_size=16, person=b"ps-data")
    with preserved_generators():
        for name, dataset in (("train", train), ("held-out", held_out)):
            _absorb(digest, name)
            if dataset is None:
                _absorb(digest, None)
                continue
            length = len(dataset)
            _absorb(digest, length)
            for index in sorted({(length - 1) * k // 7 for k in range(8)} if length else ()):
                seed_step(0, index, 0)
                with user_code(f"reading sample {index} of the {name} data", data=True):
                    sample = dataset[index]
                _absorb(digest, sample)
    return digest.hexdigest()


class _Absorbing(Protocol):
    def update(self, data: bytes, /) -> None: ...


def _absorb(digest: _Absorbing, value: Any) -> None:
    """Feed `value` to the digest by content, each part tagged with kind and length; unknown kinds by type name."""
    if isinstance(value, torch.Tensor):
        _absorb_array(digest, value.detach().cpu())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _feed(digest, f"array {value.dtype.str} {value.shape}", np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bytes | bytearray):
        _feed(digest, "bytes", bytes(value))
    elif isinstance(value, str):
        _feed(digest, "str", value.encode("utf-8", "surrogatepass"))
    elif value is None or isinstance(value, bool | int | float | complex | np.number):
        _feed(digest, "number", repr(value).encode())
    elif isinstance(value, Mapping):
        _feed(digest, f"mapping {len(value)}", b"")
        for key in value:
            _absorb(digest, key)
            _absorb(digest, value[key])
    elif isinstance(value, list | tuple):
        _feed(digest, f"sequence {len(value)}", b"")
        for item in value:
            _absorb(digest, item)
    else:
        _feed(digest, "other", f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _absorb_array(digest: _Absorbing, tensor: torch.Tensor) -> None:
    tag = f"tensor {tensor.dtype} {tuple(tensor.shape)}"
    if tensor.layout != torch.strided or tensor.is_quantized:
        _feed(digest, f"{tag} {tensor.layout}", b"")
        return
    _feed(digest, tag, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _feed(digest: _Absorbing, tag: str, content: bytes) -> None:
    digest.update(f"{tag}:{len(content)}:".encode())
    digest.update(content)
