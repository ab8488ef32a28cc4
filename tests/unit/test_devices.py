"""Which device a trainer gets: lowest free first, never one that another holds, or the reason why none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.devices import choose_device, is_valid_device
from pscluster.errors import DeviceError

TWO = ("cuda:0", "cuda:1")
WORDS = st.sampled_from(["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:5"])
SOME = st.sets(st.sampled_from([f"cuda:{index}" for index in range(4)]))


@pytest.mark.parametrize(
    ("wanted", "present", "held", "chosen"),
    [
        ("auto", (), (), "cpu"),
        ("auto", TWO, (), "cuda:0"),
        ("auto", TWO, ("cuda:0", "cpu"), "cuda:1"),
        ("auto", TWO, TWO, "cpu"),
        ("cpu", TWO, (), "cpu"),
        ("cpu", TWO, TWO, "cpu"),
        ("cuda", TWO, (), "cuda:0"),
        ("cuda", TWO, ("cuda:0",), "cuda:1"),
        ("cuda:1", TWO, (), "cuda:1"),
        ("cuda:1", TWO, ("cuda:0",), "cuda:1"),
    ],
)
def test_the_lowest_free_one_is_taken(
    wanted: str, present: tuple[str, ...], held: tuple[str, ...], chosen: str
) -> None:
    assert choose_device(wanted, present, held) == chosen


@pytest.mark.parametrize(
    ("wanted", "present", "held", "cause"),
    [
        ("cuda", (), (), "no CUDA device"),
        ("cuda:0", (), (), "no CUDA device"),
        ("cuda", TWO, TWO, "all 2 CUDA devices"),
        ("cuda:3", TWO, (), "has cuda:0..1"),
        ("cuda:3", TWO[:1], (), "has cuda:0"),
        ("cuda:1", TWO, ("cuda:1",), "the job wants cuda:1, and cuda:1 is taken by another trainer"),
    ],
)
def test_without_a_fitting_device_the_error_names_the_reason(
    wanted: str, present: tuple[str, ...], held: tuple[str, ...], cause: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        choose_device(wanted, present, held)
    assert caught.value.code == "PS-4004" and cause in caught.value.cause
    assert "psctl nodes -o wide" in caught.value.action


def test_one_whose_holder_is_being_ended_is_waited_for() -> None:
    for wanted in ("auto", "cuda", "cuda:1"):
        assert choose_device(wanted, TWO, held=("cuda:0",), leaving=("cuda:1",)) is None
    assert choose_device("auto", TWO, held=(), leaving=("cuda:0",)) == "cuda:1"
    assert choose_device("cpu", TWO, held=(), leaving=TWO) == "cpu"


@given(wanted=WORDS, present=SOME, held=SOME, leaving=SOME)
def test_no_two_ever_share_one(wanted: str, present: set[str], held: set[str], leaving: set[str]) -> None:
    leaving -= held
    try:
        chosen = choose_device(wanted, sorted(present), held, leaving)
    except DeviceError:
        assert wanted not in ("auto", "cpu")
        return
    if chosen is None:
        assert leaving & present
    elif chosen != "cpu":
        assert chosen in present - held - leaving
        assert wanted in ("auto", "cuda", chosen)


def test_words_for_a_device() -> None:
    assert all(is_valid_device(name) for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:17"))
    assert not any(
        is_valid_device(name) for name in ("", "gpu", "cuda:", "cuda:01", "cuda:-1", "cuda:0\n", "CUDA", "cuda:1٣")
    )
