"""The simulation can fail: each of these mistakes, planted in the product, breaks a promise within a few seeds."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.fault.simulation import standby_mistakes  # noqa: F401 - they are in the catalogue too
from tests.fault.simulation.invariants import Violation
from tests.fault.simulation.mistakes import MISTAKES
from tests.fault.simulation.simulation import reference_of, run_seed

WITHIN = 60  # seeds
LIVENESS_S = 40.0  # more than any history takes that has no mistake in it


@pytest.fixture(autouse=True, scope="module")
def _references() -> None:
    """What is right is known before anything is wrong."""
    for shards in (2, 3, 4, 5):
        reference_of(shards)


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.slow
def test_a_planted_mistake_is_found(name: str) -> None:
    mistake = MISTAKES[name]
    with ExitStack() as stack:
        for planted in mistake.plant():
            stack.enter_context(planted)
        for seed in range(WITHIN):
            try:
                run_seed(seed, **{"liveness_s": LIVENESS_S, **mistake.changes})
            except (Violation, KeyError):  # a coordinator that looks for a loss which it never heard has broken down
                return
    pytest.fail(f"{name} broke no promise in {WITHIN} histories")
