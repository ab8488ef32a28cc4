"""Checksums of parts make that of the whole."""

from __future__ import annotations

import crc32c
from hypothesis import given
from hypothesis import strategies as st

from pscluster.storage.snapshot import combine_crc32c


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_two_make_one(first: bytes, second: bytes) -> None:
    assert combine_crc32c(crc32c.crc32c(first), crc32c.crc32c(second), len(second)) == crc32c.crc32c(first + second)


@given(st.integers(0, 1 << 22))
def test_long_ones_too(size: int) -> None:
    first, second = b"head", bytes(size)
    assert combine_crc32c(crc32c.crc32c(first), crc32c.crc32c(second), size) == crc32c.crc32c(first + second)
