"""Machines that compute the same bits are in one class."""

from __future__ import annotations

import pytest
import torch

from psworker.numerics import numerics_class, settle_numerics


@pytest.fixture(autouse=True)
def _settled() -> None:
    settle_numerics(1, "cpu")


def test_the_class_is_the_same_whatever_came_before() -> None:
    first = numerics_class(1, "cpu")
    torch.manual_seed(3)
    torch.rand(1000) @ torch.rand(1000)
    before = torch.get_rng_state()

    assert numerics_class(1, "cpu") == first
    assert torch.equal(torch.get_rng_state(), before)


def test_the_detail_names_what_usually_differs() -> None:
    _, detail = numerics_class(1, "cpu")

    for part in ("cpu ", torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}", "1 thread,", "float32"):
        assert part in detail


def test_numerics_are_settled_and_settling_again_is_harmless() -> None:
    settle_numerics(1, "cpu")

    assert torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == (1, 1)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_changed_kernel_changes_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, _ = numerics_class(1, "cpu")
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))

    assert numerics_class(1, "cpu")[0] != honest
