"""What the partition's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from harness.played import Network


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As a partition runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
