"""One number for a model's values: what `parameters_sha256` means everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class NamedBytes(NamedTuple):
    """A tensor as the digest sees it: `dtype` is torch's name without "torch.", `data` its C-order bytes."""

    name: str
    dtype: str
    shape: Sequence[int]
    data: bytes | bytearray | memoryview


def parameters_sha256(tensors: Iterable[NamedBytes]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in name order, hex.

    Each of name, dtype and shape is written with its length before it, so that no two models share an encoding.
    """
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda t: t.name):
        shape = ",".join(str(n) for n in tensor.shape)
        for text in (tensor.name, tensor.dtype, shape):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(memoryview(tensor.data).nbytes.to_bytes(8, "little"))
        digest.update(tensor.data)
    return digest.hexdigest()
