"""The master's database is lost: `psmaster rebuild` restores the jobs, and they end with the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.cluster import LocalCluster, local_cluster
from harness.jobs import lm_spec
from harness.plain import train_plainly

STEPS = 24
PSMASTER = str(Path(sys.executable).parent / "psmaster")


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec(steps=STEPS, d_model=64)).digest


def slow_spec(**durability: object) -> dict[str, object]:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.04, partitions=2)
    return spec | {"workers": {"min": 1, "max": 2}, "durability": {"every_steps": 4, **durability}}


def rebuild(cluster: LocalCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PSMASTER, "rebuild", "--state-dir", str(cluster.state_dir / "master"), *arguments],
        env=cluster.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def lose_the_database(cluster: LocalCluster) -> None:
    files = list((cluster.state_dir / "master").glob("master.db*"))
    assert files
    for path in files:
        path.unlink()


@pytest.mark.parametrize("shared", [False, True], ids=["in the state directory", "in a store of its own"])
def test_the_database_is_lost_with_the_master_while_a_job_runs(shared: bool, digest: str, tmp_path: Path) -> None:
    store = tmp_path / "shared"
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(store=str(store) if shared else None), tmp_path)
        cluster.wait(job, "step=9")
        cluster.kill(cluster.daemon("master"))
        lose_the_database(cluster)
        if not shared:  # a master that starts now would treat the job's files as orphans
            refused = cluster.psctl("up", "--workers", "2", "--servers", "2", expect=None)
            assert refused.returncode != 0 and "psmaster rebuild" in refused.stderr
        done = rebuild(cluster, *(["--store", str(store)] if shared else []))
        assert done.returncode == 0 and job in done.stdout, done.stderr
        cluster.up(2, 2)
        answer = cluster.describe(job)
        assert answer["state"] == "STOPPED"
        assert 4 <= answer["step"] < STEPS
        assert "Rebuilt" in [event["reason"] for event in answer["events"]]
        cluster.psctl("resume", job)
        cluster.wait(job, "succeeded")
        assert cluster.describe(job)["parameters_sha256"] == digest
        assert cluster.psctl("export", job, "-o", str(tmp_path / "model.safetensors")).stdout


def test_the_database_is_damaged_and_the_error_names_the_repair(digest: str, tmp_path: Path) -> None:
    with local_cluster(tmp_path, workers=1, servers=1) as cluster:
        spec = lm_spec(steps=STEPS, d_model=64) | {"durability": {"every_steps": 4}}
        job = cluster.submit(spec, tmp_path)
        cluster.wait(job, "succeeded")
        cluster.psctl("down")
        database = cluster.state_dir / "master" / "master.db"
        data = bytearray(database.read_bytes())
        at = data.index(b'"parameters_sha256":"')
        data[at + 30] ^= 1  # a digit of the result: only a checksum detects it
        database.write_bytes(data)

        refused = cluster.psctl("up", "--workers", "1", "--servers", "1", expect=None)
        assert refused.returncode != 0
        assert "PS-4005" in refused.stderr and "psmaster rebuild" in refused.stderr

        assert rebuild(cluster).returncode == 0
        cluster.up(1, 1)
        answer = cluster.describe(job)
        assert (answer["state"], answer["parameters_sha256"]) == ("SUCCEEDED", digest)
