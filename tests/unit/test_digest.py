"""One number for a model's values."""

from __future__ import annotations

import hashlib
import itertools

from hypothesis import given
from hypothesis import strategies as st

from pscluster.step.layout import NamedBytes, parameters_sha256

A = NamedBytes("a", "float32", (2,), b"\0" * 8)
B = NamedBytes("b", "int64", (), b"\1" + b"\0" * 7)


def test_the_order_given_does_not_matter() -> None:
    assert len({parameters_sha256(order) for order in itertools.permutations([A, B, B._replace(name="c")])}) == 1


def test_the_encoding_is_what_the_documentation_says() -> None:
    encoded = b""
    for text in ("a", "float32", "2"):
        encoded += len(text).to_bytes(8, "little") + text.encode()
    encoded += (8).to_bytes(8, "little") + bytes(8)

    assert parameters_sha256([A]) == hashlib.sha256(encoded).hexdigest()


def test_every_part_of_a_tensor_counts() -> None:
    variants = [
        [A, B],
        [A],
        [],
        [A._replace(name="z"), B],
        [A._replace(dtype="int32"), B],
        [A._replace(shape=(1, 2)), B],
        [A._replace(data=b"\0" * 7 + b"\x80"), B],  # -0.0
    ]

    assert len({parameters_sha256(variant) for variant in variants}) == len(variants)


@given(texts=st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4), st.binary(max_size=4)), max_size=3))
def test_nothing_runs_into_its_neighbour(texts: list[tuple[str, str, bytes]]) -> None:
    """Two lists of tensors share a digest only when they are equal: lengths are written before everything."""
    tensors = [NamedBytes(f"{i}{name}", dtype, (), data) for i, (name, dtype, data) in enumerate(texts)]
    shifted = [NamedBytes(t.name + t.dtype[:1], t.dtype[1:], (), t.data) for t in tensors]

    assert (parameters_sha256(tensors) == parameters_sha256(shifted)) == (tensors == shifted)


def test_any_buffer_is_the_same_bytes() -> None:
    data = bytes(range(8))
    digests = {parameters_sha256([A._replace(data=d)]) for d in (data, bytearray(data), memoryview(data).cast("I"))}

    assert len(digests) == 1
