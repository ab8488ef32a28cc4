"""What travels beside the gradients, exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.errors import FrameError
from pscluster.step.tree import Summary, add_statistics, summary_bytes, touched_bits
from pscluster.wire.protocol import pack_statistics, unpack_statistics

NUMBERS = st.floats(allow_nan=False)


@given(st.integers(0, 70), NUMBERS, NUMBERS, NUMBERS, st.data())
def test_a_summary_reads_back(n: int, loss: float, weight: float, samples: float, data: st.DataObject) -> None:
    touched = data.draw(st.sets(st.integers(0, n - 1))) if n else set()
    summary = Summary(loss_sum=loss, weight=weight, samples=samples, touched=touched_bits(touched, n))

    packed = summary.pack()

    assert len(packed) == summary_bytes(n)
    assert Summary.unpack(packed, n) == summary
    assert Summary.unpack(memoryview(packed), n) == summary
    assert {t for t in range(n) if summary.is_touched(t)} == touched


@pytest.mark.parametrize("length", [0, 23, 24, 26, 1000])
def test_a_summary_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(FrameError, match=f"{length} bytes for 8 tensors"):
        Summary.unpack(bytes(length), 8)


def test_adding_is_left_plus_right_and_touched_is_either() -> None:
    left = Summary(loss_sum=0.1, weight=1e16, samples=1, touched=touched_bits([0, 9], 10))
    right = Summary(loss_sum=0.2, weight=1.0, samples=2, touched=touched_bits([1], 10))

    both = left.plus(right)

    assert (both.loss_sum, both.weight, both.samples) == (0.1 + 0.2, 1e16 + 1.0, 3)
    assert both.touched == touched_bits([0, 1, 9], 10)


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    nothing = Summary(loss_sum=0.0, weight=0.0, samples=0, touched=b"")
    bad = Summary(loss_sum=math.nan, weight=1.0, samples=1, touched=b"")

    assert math.isnan(nothing.plus(Summary.unpack(bad.pack(), 0)).loss_sum)


def test_statistics_add_and_an_empty_vector_adds_nothing() -> None:
    one, none = np.array([1.0, 2.0]), np.zeros(0)

    assert add_statistics(one, one).tolist() == [2.0, 4.0]
    assert add_statistics(one, none).tolist() == add_statistics(none, one).tolist() == [1.0, 2.0]
    assert add_statistics(none, none).size == 0
    assert one.tolist() == [1.0, 2.0], "neither side changes"


def test_statistics_of_two_shapes_are_refused() -> None:
    with pytest.raises(FrameError, match="2 and 3 numbers"):
        add_statistics(np.zeros(2), np.zeros(3))


def test_statistics_read_back_into_memory_of_their_own() -> None:
    data = bytearray(pack_statistics(np.array([1.5, -2.0])))
    vector = unpack_statistics(memoryview(data))
    data[:] = bytes(16)

    assert vector.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("length", [1, 7, 9])
def test_statistics_that_are_no_whole_numbers_are_refused(length: int) -> None:
    with pytest.raises(FrameError, match=f"{length} bytes"):
        unpack_statistics(bytes(length))
