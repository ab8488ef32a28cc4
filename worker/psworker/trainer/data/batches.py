"""From (step, shard) to a batch, and to the random numbers that go with it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch

from pscluster.step.sampling import ShardSampler, eval_batches
from pscluster.task import MapDataset
from psworker.trainer.data.loading import user_code


class Batches:
    """The training microbatches of a job. Stateless but for a cache of one epoch's order."""

    def __init__(
        self, dataset: MapDataset, collate: Callable[[Sequence[Any]], Any], sampler: ShardSampler, seed: int
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.sampler = sampler
        self.seed = seed

    def microbatch(self, step: int, shard: int) -> tuple[Any | None, int]:
        """(batch, number of samples in it) of `shard` in the step that starts from version `step`.

        (None, 0) when the short last step of an epoch leaves the shard without samples. The generators are seeded
        twice: for the data, so that augmentation is exact, and again before returning, so that the forward pass draws
        the same numbers however many the data set drew. Blocks as long as the data set does.
        Raises TaskError or DataError with the user's traceback.
        """
        indices = self.sampler.indices(step, shard)
        if not indices:
            return None, 0
        seed_step(self.seed, step, _data_stream(shard))
        batch = self.gather(indices)
        seed_step(self.seed, step, shard)
        return batch, len(indices)

    def gather(self, indices: Sequence[int]) -> Any:
        """The collated batch of the samples at `indices`. Raises TaskError or DataError with the user's
        traceback.
        """
        with user_code("reading a sample of train_data", data=True):
            samples = [self.dataset[index] for index in indices]
        with user_code("collate"):
            return self.collate(samples)


class EvalBatches:
    """The held-out batches of a job, assigned to shards: batch j goes to shard j mod D."""

    def __init__(
        self, dataset: MapDataset, collate: Callable[[Sequence[Any]], Any], num_shards: int, microbatch: int, seed: int
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.num_shards = num_shards
        self.microbatch = microbatch
        self.seed = seed

    def of_shard(self, shard: int) -> Iterator[tuple[Any, int]]:
        """Each (batch, number of samples) of `shard`, in order. The generators are seeded for every batch."""
        for batch in eval_batches(len(self.dataset), self.num_shards, self.microbatch, shard):
            seed_step(self.seed, batch.start, _data_stream(shard))
            with user_code("reading a sample of eval_data", data=True):
                samples = [self.dataset[index] for index in batch]
            with user_code("collate"):
                collated = self.collate(samples)
            seed_step(self.seed, batch.start, shard)
            yield collated, len(batch)


def _data_stream(shard: int) -> int:
    """A shard number that no shard has: data and forward pass must not draw the same numbers."""
    return -1 - shard


def seed_step(seed: int, step: int, shard: int) -> None:
    """Seed torch (CPU, and CUDA once it is in use), numpy and `random` for one (step, shard).

    The three get different words of one blake2b digest of the arguments. Cheap enough for every microbatch.
    """
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


def to_device(batch: Any, device: str) -> Any:
    """`batch` with every tensor in it moved to `device`, through mappings, lists, tuples and named tuples."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def data_fingerprint(train: MapDataset, held_out: MapDataset | None) -> str:
    """Hex digest of the lengths and of a few samples of both data sets: equal on nodes that hold the same
    data.

    Reads at most 8 samples of each, at places that depend on the length alone. Leaves the generators as
    they were.
    """
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
    """Feed `value` to the digest by content, each part tagged with kind and length; unknown kinds by type
    name.
    """
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
