"""Histories of a whole cluster in which things go wrong, with every promise checked after every event.

A history that breaks one names its seed; `make simulate SEED=n` prints it event by event. `make simulate` runs 5,000.
"""

from __future__ import annotations

import pytest

from tests.fault.simulation.faults import KINDS
from tests.fault.simulation.setting import Setting
from tests.fault.simulation.simulation import Simulation, reference_of, run_seed

NUM_SEEDS = 300
BATCH = 30


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, BATCH), ids=lambda first: f"from_{first}")
def test_faults_change_the_clock_and_never_the_result(first: int) -> None:
    struck = sum(run_seed(seed).faults.struck.total() for seed in range(first, first + BATCH))

    assert struck > BATCH


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_strikes_and_is_borne(kind: str) -> None:
    """Alone, often, and on a job that lasts."""
    storm = {"storm_s": 4.0, "every_s": 0.4, "compute_s": 0.2, "workers": 2, "servers": 2, "partitions": 2}

    assert run_seed(1, faults={kind: 1.0}, **storm).faults.struck[kind] >= 2


def test_a_seed_is_a_history() -> None:
    reported: list[list[str]] = [[], []]
    for lines in reported:
        run_seed(7, lines.append)

    assert reported[0] == reported[1]
    assert any("FAULT" in line for line in reported[0])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_undisturbed_any_cluster_gives_the_same(workers: int) -> None:
    """The monitor compares every version with what one trainer and one partition make of it."""
    setting = Setting(
        workers=workers, servers=2, partitions=3, shards=5, steps=6, evaluate_every=2, jobs=2, audit_share=1.0
    )
    simulation = Simulation(setting, reference_of(5))
    simulation.run()

    assert not simulation.faults.struck
    assert simulation.schedule.now_s < 30
    assert all((job.audits.equal, job.audits.unfinished) == (6, 0) for job in simulation.jobs())
