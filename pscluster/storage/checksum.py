"""The CRC-32C of two byte strings, one after the other, made of those of each: nothing need be read twice.

A CRC is a remainder of polynomials over GF(2), whose coefficients are bits; appending n bytes multiplies by x^(8n). As
everywhere in this CRC the bits are reversed: the coefficient of x^0 is the highest of 32.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0x82F6_3B78  # Castagnoli's, without x^32
_WORD = 0xFFFF_FFFF
_ONE = 1 << 31
_X8 = 1 << 23


def combined(first: int, second: int, second_bytes: int) -> int:
    """The CRC of both, from the first's, the second's, and the second's length."""
    return _times(_shift(second_bytes), first) ^ second


@lru_cache(maxsize=1024)
def _shift(num_bytes: int) -> int:
    """x^(8 num_bytes), by squaring."""
    power, square = _ONE, _X8
    while num_bytes:
        if num_bytes & 1:
            power = _times(power, square)
        square = _times(square, square)
        num_bytes >>= 1
    return power


def _times(left: int, right: int) -> int:
    """The product modulo the polynomial."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = left << 1 & _WORD
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product
