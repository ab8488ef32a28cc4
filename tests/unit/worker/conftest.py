"""What the worker's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest
import torch

from pscluster.job.spec import JobSpec, parse_spec


class MakeSpec(Protocol):
    def __call__(self, entrypoint: str = ..., args: dict[str, Any] | None = ..., **sections: Any) -> JobSpec: ...


@pytest.fixture
def make_spec() -> MakeSpec:
    """A small valid spec, of the synthetic language model unless told: 4 shards of 4 samples."""

    def make(
        entrypoint: str = "psworker.tasks.synthetic:SyntheticLm", args: dict[str, Any] | None = None, **sections: Any
    ) -> JobSpec:
        train = {"global_batch": 16, "microbatch": 4, "max_steps": 3, "seed": 1, **sections.pop("train", {})}
        task = {"entrypoint": entrypoint, "args": args or {}}
        return parse_spec({"name": "job", "task": task, "train": train, **sections})

    return make


@pytest.fixture(autouse=True)
def _own_numerics() -> Iterator[None]:
    """What a test settles about torch ends with it."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
