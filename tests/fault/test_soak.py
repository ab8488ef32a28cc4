"""The short form of `make soak`, its storm, and what its instruments detect."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.commits import Commit, Commits, recovery_s
from harness.faults import KINDS, draw_faults
from harness.growth import Growth, Look
from harness.jobs import lm_spec
from harness.plain import train_plainly
from harness.soak import Run, Soak, compared, soak

SEED = 45  # has every kind and both actions within eight faults
KILLS = int(os.environ.get("KILLS", "8"))


@pytest.mark.timeout(60 + 40 * KILLS)
def test_faults_change_no_bit_and_leave_nothing(tmp_path: Path) -> None:
    spec = lm_spec(partitions=3, d_model=64, pause_s=0.01) | {"workers": {"min": 1, "max": 3}}
    plan = Soak(spec=spec, kills=KILLS, seed=SEED, gap=8)
    plain = train_plainly(plan.job_spec())
    result = soak(plan, tmp_path, tmp_path / "evidence", print, plain.digest)
    assert result["keys"]["soak_kills_without_violation"] == len(result["struck"]) == KILLS
    assert result["violations"] == []
    assert all(struck["next_commit_after_s"] is not None for struck in result["struck"])


def test_the_short_form_has_every_kind() -> None:
    faults = draw_faults(SEED, 8, gap=8)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.action for fault in faults} == {"kill", "stop"}


def test_a_seed_decides_the_storm() -> None:
    assert draw_faults(3, 200) == draw_faults(3, 200)
    assert draw_faults(3, 200) != draw_faults(4, 200)
    assert draw_faults(3, 200)[:50] == draw_faults(3, 50)
    counts = Counter(fault.kind for fault in draw_faults(3, 1_000))
    assert all(150 < counts[kind] < 250 for kind in KINDS), counts
    steps = [fault.step for fault in draw_faults(3, 200)]
    assert all(8 <= later - earlier <= 24 for earlier, later in itertools.pairwise(steps))


def test_a_recovery_is_measured_to_the_step_that_needed_it() -> None:
    steps = [Commit(step=n, time_s=n / 10) for n in range(1, 11)]
    slipped = [*steps, Commit(step=11, time_s=1.15), Commit(step=12, time_s=3.0), Commit(step=13, time_s=3.1)]
    assert recovery_s(slipped, 1.1, 0.1) == pytest.approx(1.8)  # step 11 was complete when the fault struck
    clean = [*steps, Commit(step=11, time_s=2.5), Commit(step=12, time_s=2.6)]
    assert recovery_s(clean, 1.05, 0.1) == pytest.approx(1.35)
    with pytest.raises(ValueError, match="fewer than two"):
        recovery_s(steps, 0.95, 0.1)


def test_growth_is_distinguished_from_noise() -> None:
    def looks(resident: list[int], files: int) -> list[Look]:
        return [
            Look(at_s=10.0 * n, resident_bytes=size << 20, files=files + n * 4, threads=3, mappings=2)
            for n, size in enumerate(resident)
        ]

    growth = Growth(
        names={(7, 1.0): "master"}, looks={(7, 1.0): looks([100, 300, 100, 110, 100, 105, 300, 100, 100], 0)}
    )
    assert growth.violations() == []
    growth.looks[(7, 1.0)] = looks([100, 120, 140, 160, 180, 200, 220, 240, 260], 5)
    (message,) = growth.violations()[:1]
    assert "master (pid 7): resident_bytes grew from" in message


def test_a_missing_record_is_reported() -> None:
    job: Any = SimpleNamespace(job_id="job-a", parameters_sha256="f00d", step=2, metrics={})
    lines = [{"step": step, "loss": 0.5, "grad_norm": 1.0, "lr": 0.1} for step in (1, 2)]
    whole = Run(job, Commits(Path(), "job-a"), lines)
    assert compared(whole, whole) == []
    (message,) = compared(whole, Run(job, whole.commits, lines[:1]))
    assert message == "job-a: 1 steps were committed and are not in the record: [2]"
