"""The layout of a model: tensors -> padded buckets -> blocks -> partitions, as pure functions.

A bucket is a contiguous run of 4-byte words that holds tensors of one kind, each padded to 16 words. The kind defines
how a step treats it:

    trained    parameters (fp32): gradients are summed in the tree, the optimizer updates them
    averaged   floating-point buffers (fp32): the tree sums weight * value, the commit divides by the weight
    carried    integer and boolean buffers (raw bytes): shard 0's value is committed
    frozen     parameters without gradient and buffers that a step must not change: floating-point ones that are not
               fp32, complex and sparse ones (raw bytes)

A bucket is cut into blocks of 32 Ki words, the unit of norms, and the blocks are assigned to the partitions in even
runs. Every trainer and partition computes the same layout from the same model; `sha256` compares them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple, get_args

from pscluster.errors import LayoutError

PAD_WORDS = 16  # vector lanes: on multiples of 16 words results are the same bits wherever a chunk starts
BLOCK_WORDS = 32 * 1024
BUCKET_WORDS = 1024 * 1024  # a bucket is closed once it holds this many words (4 MiB)
WORD_BYTES = 4

Codec = Literal["fp32", "bf16"]
CODEC_BYTES: dict[Codec, int] = {"fp32": 4, "bf16": 2}  # of one word of a trained bucket on the wire
BucketKind = Literal["trained", "averaged", "carried", "frozen"]
KINDS: tuple[BucketKind, ...] = ("trained", "averaged", "carried", "frozen")
ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2}
ITEM_BYTES |= {"int8": 1, "uint8": 1, "bool": 1, "uint16": 2, "uint32": 4, "uint64": 8}
ITEM_BYTES |= {"complex32": 4, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1}
ITEM_BYTES |= {"float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1}

Form = Literal["", "channels_last", "channels_last_3d", "coo", "coo_uncoalesced", "csr", "csc", "bsr", "bsc"]
FORMS: tuple[Form, ...] = get_args(Form)  # the sparse ones from the fourth on
_DIMENSIONS = {"channels_last": 4, "channels_last_3d": 5}


@dataclass(frozen=True)
class Part:
    """One dense tensor, in C order, of those that a sparse one consists of."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_words(self) -> int:
        return _words_for(prod(self.shape) * ITEM_BYTES[self.dtype])


def padded(num_words: int) -> int:
    """The words that a tensor of `num_words` fills, with the padding behind it."""
    return -(-num_words // PAD_WORDS) * PAD_WORDS


def _words_for(size_bytes: int) -> int:
    return -(-size_bytes // WORD_BYTES)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the model. `names`: its state-dict names, the canonical one first (tied weights have several).

    `decay`: weight decay applies. `persistent`: part of the state dict. `dtype` is torch's name without "torch.".
    `form`: the order of its words: "" is C order, "channels_last" that memory format, the rest are sparse layouts,
    whose dense `parts` follow one another, each padded.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: BucketKind
    decay: bool = False
    persistent: bool = True
    form: Form = ""
    parts: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_words(self) -> int:
        """4-byte words it fills, unpadded (the last may be partly used)."""
        if self.parts:
            return sum(padded(part.num_words) for part in self.parts)
        return _words_for(self.num_elements * ITEM_BYTES[self.dtype])

    def to_dict(self) -> dict[str, object]:
        """As plain data, without what only some tensors have: the layouts of all others stay the same bytes."""
        fields = asdict(self)
        for name in ("form", "parts"):
            if not fields[name]:
                del fields[name]
        return fields


@dataclass(frozen=True)
class Placed:
    """Tensor number `tensor` of the layout, `offset` words from the start of its bucket."""

    tensor: int
    offset: int


@dataclass(frozen=True)
class Bucket:
    """`index` is its number in the layout; `num_words` a multiple of 16; `first_block` counts over all buckets."""

    index: int
    kind: BucketKind
    placed: tuple[Placed, ...]
    num_words: int
    first_block: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_words // BLOCK_WORDS)


@dataclass(frozen=True)
class Span:
    """The words start <= w < stop of one bucket; `first_block` is the global number of the block at `start`."""

    bucket: int
    start: int
    stop: int
    first_block: int

    @property
    def num_words(self) -> int:
        return self.stop - self.start

    @property
    def size_bytes(self) -> int:
        return self.num_words * WORD_BYTES


@dataclass(frozen=True)
class Layout:
    """The tensors of a model in order, and what is derived from them."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Trained buckets first, in the order of the model (roughly the order in which forward needs them)."""
        buckets: list[Bucket] = []
        first_block = 0
        for kind in KINDS:
            members = [i for i, tensor in enumerate(self.tensors) if tensor.kind == kind]
            for placed, num_words in _fill(self.tensors, members):
                bucket = Bucket(len(buckets), kind, placed, num_words, first_block)
                first_block += bucket.num_blocks
                buckets.append(bucket)
        return tuple(buckets)

    @cached_property
    def bucket_of(self) -> dict[int, tuple[int, int]]:
        """Tensor number -> (bucket index, offset in words)."""
        return {p.tensor: (b.index, p.offset) for b in self.buckets for p in b.placed}

    def span(self, bucket: int, partition: int, num_partitions: int) -> Span:
        """The words of a bucket that a partition holds; may be empty. Runs of whole blocks, rotated by one
        partition from bucket to bucket, so that small buckets are not all assigned to the same one."""
        b = self.buckets[bucket]
        place = (partition + bucket) % num_partitions
        first = place * b.num_blocks // num_partitions
        last = (place + 1) * b.num_blocks // num_partitions
        start, stop = min(first * BLOCK_WORDS, b.num_words), min(last * BLOCK_WORDS, b.num_words)
        return Span(bucket, start, stop, b.first_block + first)

    def spans(self, partition: int, num_partitions: int) -> tuple[Span, ...]:
        """The spans of one partition: one for each bucket, in order."""
        return tuple(self.span(b.index, partition, num_partitions) for b in self.buckets)

    def wire_bytes(self, span: Span, codec: Codec) -> int:
        """Length of a span on the wire: trained words are sent in the codec, others unchanged."""
        trained = self.buckets[span.bucket].kind == "trained"
        return span.num_words * (CODEC_BYTES[codec] if trained else WORD_BYTES)

    def gradient_bytes(self, spans: Sequence[Span], codec: Codec) -> list[int]:
        """Length of each span's gradient on the wire; 0 for the buckets that have none."""
        return [self.wire_bytes(s, codec) if self.buckets[s.bucket].kind == "trained" else 0 for s in spans]

    def to_json(self) -> bytes:
        """Canonical JSON: equal layouts give equal bytes."""
        return self._json

    @cached_property
    def _json(self) -> bytes:
        """Cached, since every snapshot begins with it."""
        tensors = [tensor.to_dict() for tensor in self.tensors]
        return json.dumps({"format": 1, "tensors": tensors}, sort_keys=True, separators=(",", ":")).encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    @classmethod
    def from_json(cls, data: bytes) -> Layout:
        """The inverse of `to_json`. Raises LayoutError for any other data."""
        try:
            parsed = json.loads(data)
            if parsed["format"] != 1:
                raise LayoutError(f"layout format {parsed['format']} is unknown")
            return cls(tuple(_tensor_from(entry) for entry in parsed["tensors"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise LayoutError(f"a layout does not parse: {error!r}") from None


def _fill(tensors: Sequence[TensorSpec], members: Sequence[int]) -> list[tuple[tuple[Placed, ...], int]]:
    """Fill buckets with tensors in order; a bucket is closed when it has reached its size."""
    filled: list[tuple[tuple[Placed, ...], int]] = []
    placed: list[Placed] = []
    offset = 0
    for number in members:
        placed.append(Placed(number, offset))
        offset += padded(tensors[number].num_words)
        if offset >= BUCKET_WORDS:
            filled.append((tuple(placed), offset))
            placed, offset = [], 0
    if placed and offset:
        filled.append((tuple(placed), offset))
    return filled


def _tensor_from(entry: dict[str, object]) -> TensorSpec:
    fields = dict(entry)
    for key, of in (("names", str), ("shape", int)):
        value = fields[key]
        if not isinstance(value, list) or any(type(item) is not of for item in value):
            raise TypeError(f"{key} is no list of {of.__name__}")
        fields[key] = tuple(value)
    fields["parts"] = tuple(_part_from(part) for part in fields.get("parts", ()))  # type: ignore[attr-defined]
    spec = TensorSpec(**fields)  # type: ignore[arg-type]  # a wrong key raises TypeError, which the caller reports
    known = spec.names and spec.kind in KINDS and spec.dtype in ITEM_BYTES and all(n >= 0 for n in spec.shape)
    if not known or type(spec.decay) is not bool or type(spec.persistent) is not bool:
        raise ValueError(f"tensor {spec.names} is not of a known kind, dtype or shape")
    if spec.kind in ("trained", "averaged") and spec.dtype != "float32":
        raise ValueError(f"tensor {spec.names} of kind {spec.kind} is {spec.dtype}")
    if spec.form not in FORMS or len(spec.shape) != _DIMENSIONS.get(spec.form, len(spec.shape)):
        raise ValueError(f"tensor {spec.names} is not of a known form")
    if bool(spec.parts) != (spec.form in FORMS[3:]):
        raise ValueError(f"tensor {spec.names} has {len(spec.parts)} parts")
    return spec


def _part_from(entry: object) -> Part:
    part = Part(**{**entry, "shape": tuple(entry["shape"])}) if isinstance(entry, dict) else None
    if part is None or part.dtype not in ITEM_BYTES or any(type(n) is not int or n < 0 for n in part.shape):
        raise TypeError(f"{entry!r:.80} is no part of a tensor")
    return part


class NamedBytes(NamedTuple):
    """A tensor as input of the digest: `dtype` is torch's name without "torch.", `data` its C-order bytes."""

    name: str
    dtype: str
    shape: Sequence[int]
    data: bytes | bytearray | memoryview


def parameters_sha256(tensors: Iterable[NamedBytes]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in name order, hex. Each of name, dtype and shape is
    preceded by its length, so that no two models share an encoding."""
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda t: t.name):
        shape = ",".join(str(n) for n in tensor.shape)
        for text in (tensor.name, tensor.dtype, shape):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(memoryview(tensor.data).nbytes.to_bytes(8, "little"))
        digest.update(tensor.data)
    return digest.hexdigest()
