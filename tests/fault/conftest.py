"""The job that most fault tests disturb, and its expected digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.jobs import lm_spec
from harness.paced_task import paced_spec
from harness.plain import train_plainly

STEPS = 60
_SMALL: dict[str, Any] = {"steps": STEPS, "layers": 1, "d_model": 64, "heads": 2}


@pytest.fixture(scope="session")
def digest() -> str:
    """The digest of a plain loop over the same data."""
    return train_plainly(lm_spec(**_SMALL)).digest


@pytest.fixture
def paced(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The spec of that job, for two trainers and two partitions, to be submitted from `tmp_path`; slow while the file
    is there."""
    spec, pace = paced_spec(lm_spec(partitions=2, **_SMALL), tmp_path, slow_s=0.15)
    return spec | {"workers": {"min": 1, "max": 2}}, pace
