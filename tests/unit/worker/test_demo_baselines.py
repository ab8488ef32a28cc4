"""The n-gram models that the demo compares with are what textbooks say."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st


def _load() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "ngram.py"
    spec = importlib.util.spec_from_file_location("demo_ngram", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ngram = _load()


def probability(train: bytes, context: bytes, byte: int) -> float:
    """Interpolated Witten-Bell, counted the slow way."""
    shorter = probability(train, context[1:], byte) if context else 1 / 256
    length = len(context)
    followers = Counter(train[i + length] for i in range(len(train) - length) if train[i : i + length] == context)
    n, t = followers.total(), len(followers)
    return (followers[byte] + t * shorter) / (n + t) if n else shorter


@given(
    train=st.binary(min_size=3, max_size=60).map(lambda b: bytes(x % 4 for x in b)),
    held_out=st.binary(min_size=2, max_size=20).map(lambda b: bytes(x % 5 for x in b)),
    order=st.integers(1, 3),
)
def test_the_bits_are_those_of_the_slow_count(train: bytes, held_out: bytes, order: int) -> None:
    odds = [probability(train, held_out[max(0, i - order + 1) : i], held_out[i]) for i in range(1, len(held_out))]

    expected = -sum(math.log2(p) for p in odds) / len(odds)

    assert ngram.bits_per_byte(train, held_out, order) == pytest.approx(expected)


def test_probabilities_add_up_to_one() -> None:
    train = b"abracadabra"

    assert sum(probability(train, b"br", byte) for byte in range(256)) == pytest.approx(1)


def test_a_longer_context_helps_on_regular_text() -> None:
    text = b"the cat sat on the mat and the rat sat on the cat " * 20

    bits = [ngram.bits_per_byte(text, text[:200], order) for order in (1, 2, 3)]

    assert bits[0] > bits[1] > bits[2]
