"""What the suites of every transport share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.wire import TRANSPORTS, World


@pytest.fixture(params=TRANSPORTS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Two sides of one transport."""
    made = World.create(request.param, tmp_path)
    yield made
    with contextlib.suppress(OSError):  # one test closes it by itself
        made.reactor.close()
