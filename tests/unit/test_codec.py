"""Narrow gradients: rounded to the nearest even once for each number that comes into being, whoever adds."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.played import played_spec
from pscluster.step.codec import DTYPES, add_optional, as_bytes
from pscluster.step.layout import CODEC_BYTES, Layout, TensorSpec
from pscluster.step.tree import TreeNode, tree_of
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.state import PartitionState
from psworker.trainer.gradients.accumulate import Counter, Gradients, add_gradients
from psworker.trainer.gradients.push import gather, write

BITS = st.integers(0, 2**16 - 1)  # of any bf16 number


def narrow(*bits: int) -> torch.Tensor:
    """The bf16 numbers with these bits."""
    return torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def nearest_even(exact: Fraction) -> float:
    """An exact number in bf16: 8 significant bits, ties to the even one, gradual underflow, overflow to infinity."""
    if not exact:
        return 0.0
    numerator, denominator = abs(exact).as_integer_ratio()
    exponent = numerator.bit_length() - denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 7)
    rounded = round(exact / unit) * unit  # of Fractions, to the even one
    return math.copysign(math.inf, exact) if abs(rounded) >= Fraction(2) ** 128 else float(rounded)


def same(mine: float, other: float) -> bool:
    return mine == other or (math.isnan(mine) and math.isnan(other))


def added(left: int, right: int) -> float:
    a, b = narrow(left).item(), narrow(right).item()
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    return nearest_even(Fraction(a) + Fraction(b))


@settings(max_examples=500)
@given(left=BITS, right=BITS)
@example(left=0x3F80, right=0x3B80)  # 1 + 2^-8: halfway, to the even 1
@example(left=0x3F81, right=0x3B80)  # 1 + 2^-7 + 2^-8: halfway, to the even 1 + 2^-6
@example(left=0x3F80, right=0x3B81)  # a little more than halfway
@example(left=0x3F80, right=0xBB00)  # below a power of two numbers lie closer
@example(left=0x7F7F, right=0x7B00)  # halfway to what is too big
@example(left=0x7F7F, right=0x7AFF)
@example(left=0x0001, right=0x0001)  # the smallest there is
@example(left=0x7F80, right=0xFF80)
def test_a_sum_is_rounded_once(left: int, right: int) -> None:
    total = narrow(left).add_(narrow(right)).item()

    assert same(total, added(left, right))
    assert same(total, (narrow(left).float() + narrow(right).float()).bfloat16().item()), "as the fp32 sum is"


@settings(max_examples=200)
@given(bits=BITS, exponent=st.integers(-20, -7))
def test_halfway_goes_to_the_even_one(bits: int, exponent: int) -> None:
    """Half a unit of the last place, and fractions of it, on top of any number."""
    value = narrow(bits)
    if not math.isfinite(value.item()) or not value.item():
        return
    step = math.ldexp(1.0, max(math.frexp(value.item())[1] - 1, -126) + exponent)
    other = torch.tensor(step, dtype=torch.bfloat16)
    assert value.clone().add_(other).item() == nearest_even(Fraction(value.item()) + Fraction(other.item()))


@settings(max_examples=300)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(value=1 + 2**-8)
@example(value=1 + 3 * 2**-8)
@example(value=1 + 2**-8 + 2**-23)
@example(value=2.0**-134)
def test_a_leaf_is_rounded_to_the_nearest_even(value: float) -> None:
    assert torch.tensor(value).to(DTYPES["bf16"]).item() == nearest_even(Fraction(value))


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_nothing_is_what_zeros_are(dtype: torch.dtype) -> None:
    """None on either side gives the bits that added zeros give: -0.0 becomes 0.0."""
    words = torch.tensor([-0.0, 0.0, -1.5, float("inf")], dtype=dtype)
    for left, right in ((words.clone(), None), (None, words.clone())):
        found = add_optional(left, right)
        assert found is (left if left is not None else right), "in the memory that there is"
        assert found is not None
        assert as_bytes(found).tobytes() == as_bytes(words + torch.zeros(4, dtype=dtype)).tobytes()
    assert add_optional(None, None) is None


def test_a_codec_is_as_wide_as_its_numbers() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == CODEC_BYTES


# ---- the worker's sums and the partition's are the same sums ----

LAYOUT = Layout(
    tuple(
        TensorSpec(names=(f"w{n}",), shape=(size,), dtype="float32", kind="trained")
        for n, size in enumerate((20, 3, 200, 1))
    )
)


def leaf(shard: int, touched: int, dtype: torch.dtype) -> Gradients:
    """A microbatch's gradients: of very different sizes, some of them -0.0; a tensor without its bit has none."""
    generator = torch.Generator().manual_seed(shard)
    found: Gradients = []
    for number, spec in enumerate(LAYOUT.tensors):
        values = torch.randn(spec.shape, generator=generator)
        values *= 2.0 ** torch.randint(-9, 9, spec.shape, generator=generator)
        values[values.abs() < 0.1] = -0.0
        found.append(values.to(dtype) if touched >> number & 1 else None)
    return found


def pushed(shards: list[int], touched: list[int], dtype: torch.dtype) -> list[tuple[TreeNode, torch.Tensor]]:
    """The nodes of one worker as they go to a partition."""
    tree = tree_of(len(touched))
    counter: Counter[Gradients] = Counter(tree, add_gradients)
    counter.begin(tree.cover(shards))
    nodes = [found for s in shards for found in counter.carry(TreeNode(s, 1), leaf(s, touched[s], dtype))]
    words = []
    for node, gradients in nodes:
        target = torch.full((LAYOUT.buckets[0].num_words,), 7.0, dtype=dtype)
        write(gather(LAYOUT, 0, gradients), LAYOUT.span(0, 0, 1), target, lambda source, to: to.copy_(source))
        words.append((node, target))
    return words


def summed(nodes: list[tuple[TreeNode, torch.Tensor]], codec: str, num_shards: int) -> tuple[bytes, dict[int, float]]:
    """What a partition's gate makes of nodes in this order: the root, and its squares."""
    spec = played_spec(num_shards, network={"push_codec": codec})
    step = OpenStep(PartitionState.empty(LAYOUT, 0, 1, 0), spec, 1)
    released: list[TreeNode] = []
    for node, words in nodes:
        assert step.offer_trained(0, node, words.clone(), partial(released.append, node))
    assert step.trained[0].is_complete
    assert len(released) == len(nodes) - 1
    return as_bytes(step.trained[0].root).tobytes(), step.make_vote()[0]


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@settings(max_examples=40)
@given(num_shards=st.integers(1, 9), data=st.data())
def test_any_split_over_workers_in_any_order_gives_the_bits_of_one(
    codec: str, num_shards: int, data: st.DataObject
) -> None:
    touched = data.draw(st.lists(st.integers(0, 15), min_size=num_shards, max_size=num_shards))
    owners = data.draw(st.lists(st.integers(0, 2), min_size=num_shards, max_size=num_shards))
    dtype = DTYPES[codec]  # type: ignore[index]
    alone = summed(pushed(list(range(num_shards)), touched, dtype), codec, num_shards)
    split = [
        node
        for worker in range(3)
        for node in pushed([s for s in range(num_shards) if owners[s] == worker], touched, dtype)
    ]

    assert summed(data.draw(st.permutations(split)), codec, num_shards) == alone
