"""kill -9 of a trainer at each phase of a step, and of everything at once: its shards count once, the bits stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.cluster import local_cluster, wait_gone
from harness.fatal_task import PHASES, fatal_spec
from harness.faults import victims
from harness.jobs import lm_spec
from harness.plain import train_plainly


def test_a_trainer_killed_in_each_phase_changes_no_bit(tmp_path: Path) -> None:
    """Over TCP, where values arrive while the batch is made and gradients leave while backward goes on."""
    spec = lm_spec(steps=40, partitions=2, transport="tcp", d_model=64, pause_s=0.01)
    digest = train_plainly(lm_spec(steps=40, d_model=64)).digest
    spec, marks = fatal_spec(spec | {"workers": {"min": 1, "max": 2}}, tmp_path)
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(spec, tmp_path)
        cluster.wait(job, "succeeded")
        answer = cluster.describe(job)
    assert sorted(path.name for path in marks.iterdir()) == sorted(PHASES)  # every one struck
    assert [event["reason"] for event in answer["events"]].count("TrainerLost") == len(PHASES)
    assert "RolledBack" not in [event["reason"] for event in answer["events"]]
    assert answer["parameters_sha256"] == digest


def test_jobs_continue_after_everything_is_killed_without_a_command(
    paced: tuple[dict[str, Any], Path], digest: str, tmp_path: Path
) -> None:
    """One job runs and one is queued; the daemons are restarted, and no job is resumed by a command."""
    spec, pace = paced
    spec |= {"workers": {"min": 2, "max": 2}}
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        first, queued = (cluster.submit(spec, tmp_path) for _ in range(2))
        cluster.wait(first, "step=6")  # beyond the snapshot of step 4
        cluster.until(queued, lambda found: found.reason.startswith("waits for"))
        killed = list(victims(cluster))
        assert {victim.kind for victim in killed} == {"master", "worker", "server", "trainer", "partition"}
        for victim in killed:
            victim.process.kill()
        wait_gone([victim.process for victim in killed])
        pace.unlink()
        cluster.up(2, 2)
        for job in (first, queued):
            cluster.wait(job, "succeeded")
            assert cluster.describe(job)["parameters_sha256"] == digest
        went_back = [event["message"] for event in cluster.describe(first)["events"] if event["reason"] == "RolledBack"]
        assert went_back and "the snapshot of step 0" not in went_back[-1]
