"""A snapshot is reported after the record of every step before it, so that no step is missing after a rollback."""

from __future__ import annotations

from pathlib import Path

from harness.jobs import even_split, lm_spec
from harness.static_job import StaticJob


def test_the_coordinator_reports_its_steps_before_its_snapshot(tmp_path: Path) -> None:
    with StaticJob(lm_spec(partitions=2, steps=12, d_model=64), 2, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(7, 2))
        job.wait_finished()
        job.wait(lambda: 12 in job.complete_steps(), "the last snapshot")
        answer: set[int] = set()
        written = []
        for report in job.children["partition-0"].reports:
            answer |= {record.step for record in report.progress.records}
            if report.WhichOneof("body") == "snapshot_part":
                written.append(report.snapshot_part.step)
                assert answer >= set(range(1, report.snapshot_part.step + 1))
    assert {4, 8, 12} <= set(written)
