"""What `psctl up` and `down` say of unfinished jobs. The master is one of this process; no daemon is ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pscluster.cli.local.cluster import LocalCluster
from pscluster.cli.updown import continued_jobs, unfinished_jobs
from pscluster.errors import InternalError
from pscluster.settings import ClientSettings, LocatedCluster
from pscluster.v1 import jobs_pb2
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster, Serving, ended_message, job_message, snapshot_message


@pytest.fixture
def located(serving: Serving, tmp_path: Path) -> LocatedCluster:
    settings = ClientSettings(state_dir=tmp_path, address=serving.address, token_file=serving.token_file)
    return settings.located({})


@pytest.fixture
def jobs(fake: FakeMaster) -> None:
    """Newest first, as the master lists them."""
    waiting = job_message(job_id="lm-3", state=jobs_pb2.JOB_STATE_QUEUED, step=0)
    fake.jobs = {"3": waiting, "2": ended_message(job_id="lm-2"), "1": job_message(job_id="lm-1", step=546)}


@pytest.mark.usefixtures("jobs")
def test_unfinished_jobs_are_named_oldest_first(located: LocatedCluster, fake: FakeMaster) -> None:
    assert unfinished_jobs(located) == [
        "lm-1 was at step 546; it continues after the next psctl up",
        "lm-3 was QUEUED; it continues after the next psctl up",
    ]
    assert continued_jobs(located, anew=False) == ["continuing: lm-1", "continuing: lm-3"]
    fake.snapshots = [snapshot_message(450), snapshot_message(500)]
    assert continued_jobs(located, anew=True) == [
        "continuing: lm-1 (from step 500)",
        "continuing: lm-3 (from step 500)",
    ]


@pytest.mark.usefixtures("jobs")
def test_a_master_that_does_not_answer_fails_nothing(
    located: LocatedCluster, fake: FakeMaster, serving: Serving
) -> None:
    fake.failures["List"] = [InternalError("odd")]
    assert unfinished_jobs(located) == []
    serving.stop()
    assert unfinished_jobs(located) == []
    assert continued_jobs(located, anew=True) == []
    assert unfinished_jobs(replace(located, local=True, address="unix:/nowhere")) == []


@pytest.mark.usefixtures("jobs")
def test_down_says_what_it_leaves(
    run_alone: Psctl, located: LocatedCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster = LocalCluster(located=located, print_info=lambda _: None)
    monkeypatch.setattr("pscluster.cli.updown._local", lambda _session: cluster)
    monkeypatch.setattr(LocalCluster, "down", lambda _self: True)
    assert run_alone("down").stderr.splitlines() == [
        "the cluster is down",
        "lm-1 was at step 546; it continues after the next psctl up",
        "lm-3 was QUEUED; it continues after the next psctl up",
    ]
    monkeypatch.setattr(LocalCluster, "down", lambda _self: False)
    assert run_alone("down").stderr == f"no cluster runs with state directory {tmp_path}\n"
