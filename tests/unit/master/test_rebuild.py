"""The database comes back from the manifests: what is sound and nothing else, and nothing is destroyed on the way."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pscluster.errors import DamagedError, StateError
from pscluster.security.authority import Authority, cluster_id_of
from pscluster.security.identity import Role
from pscluster.storage import open_store
from psmaster import daemon
from psmaster.control.security import CERTIFICATES
from psmaster.model.access import TokenRecord
from psmaster.model.job import Best, Job, JobState
from psmaster.model.plan import Part, RestorePoint
from psmaster.storage import manifest, rebuild
from psmaster.storage.manifest import Manifest
from psmaster.storage.orphans import refuse_unclaimed
from psmaster.storage.rebuild import LEAP, Found
from psmaster.storage.sqlite import DATABASE, SqliteStore
from psmaster.storage.store import Batch
from tests.harness.master_world import make_job
from tests.unit.master.test_manifest_publisher import BUNDLE, SHA256

NOW_S = 5000.0


def running(job_id: str = "a", **changes: object) -> Job:
    job = replace(
        make_job(job_id),
        state=JobState.RUNNING,
        generation=7,
        attempts=(("trainer-0", 3),),
        layout_json=b"{}",
        layout_sha256="L",
        numerics_class="n",
        data_fingerprint="d",
        final_step=100,
        step=23,
        high_step=23,
        revision=9,
    )
    return replace(job, **changes)  # type: ignore[arg-type]


def save(store_at: Path, job: Job, *steps: int) -> None:
    """Complete snapshots of two parts each, as partitions and the master leave them."""
    store = open_store(store_at)
    for step in steps:
        parts = []
        for index in (0, 1):
            name = f"step-{step}.part-{index}"
            written = store.write(name, [f"{job.job_id} {name}".encode()])
            parts.append(
                Part(
                    step=step,
                    partition=index,
                    generation=job.generation,
                    path=name,
                    size_bytes=written.size_bytes,
                    checksum=written.checksum,
                )
            )
        data = manifest.encode(Manifest(job=job, point=RestorePoint(step=step, parts=tuple(parts))))
        store.write(manifest.manifest_name(step), [data])


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "master"
    directory.mkdir()
    return directory


def at_home(state_dir: Path, job_id: str = "a") -> Path:
    return state_dir / "jobs" / job_id / "snapshots"


def run(state_dir: Path, *stores: str) -> dict[str, Found]:
    found = rebuild.rebuild(state_dir, stores, NOW_S)
    with closing(SqliteStore(state_dir / DATABASE)) as store:
        stored = {job.job_id: job for job in store.jobs()}
        assert stored == {one.job.job_id: one.job for one in found}
        for one in found:
            assert store.parts(one.job.job_id) == tuple(one.catalogue.parts[key] for key in sorted(one.catalogue.parts))
    return {one.job.job_id: one for one in found}


def test_a_running_job_comes_back_stopped_at_its_newest_snapshot(state_dir: Path) -> None:
    job = running()
    save(at_home(state_dir), job, 10, 20)

    found = run(state_dir)["a"]

    assert (found.job.state, found.job.step) == (JobState.STOPPED, 20)
    assert found.catalogue.complete_steps() == (10, 20)
    assert found.problems == ()
    assert (found.job.spec, found.job.layout_json, found.job.numerics_class) == (job.spec, b"{}", "n")
    assert found.job.store == str(at_home(state_dir))
    assert found.job.directory == str(state_dir / "jobs" / "a")
    assert len(found.job.data_token) == 32
    assert found.job.generation == 7 + LEAP and found.job.attempts == (("trainer-0", 3 + LEAP),)


def test_a_job_that_had_ended_is_as_it_was(state_dir: Path) -> None:
    job = running(
        state=JobState.SUCCEEDED, step=20, ended_s=50.0, parameters_sha256="f00d", best=Best(step=10, value=1.0)
    )
    save(at_home(state_dir), job, 10, 20)
    found = run(state_dir)["a"].job
    assert (found.state, found.parameters_sha256, found.ended_s) == (JobState.SUCCEEDED, "f00d", 50.0)
    assert found.best == Best(step=10, value=1.0)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest"])
def test_a_damaged_snapshot_is_left_out_and_named(state_dir: Path, damage: str) -> None:
    job = running(state=JobState.SUCCEEDED, step=20, parameters_sha256="f00d", best=Best(step=20, value=1.0))
    store = at_home(state_dir)
    save(store, job, 10, 20)
    victim = store / (manifest.manifest_name(20) if damage == "manifest" else "step-20.part-1")
    data = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(data[:-2] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])

    found = run(state_dir)["a"]

    assert found.catalogue.complete_steps() == (10,)
    assert len(found.problems) == 1 and victim.name in found.problems[0]
    assert (found.job.state, found.job.step) == (JobState.STOPPED, 10), "its result is lost, it must compute it again"
    assert found.job.parameters_sha256 == "" and found.job.best is None


def test_a_job_without_a_sound_snapshot_is_put_aside_not_removed(state_dir: Path) -> None:
    save(at_home(state_dir), running(), 10)
    (at_home(state_dir) / "step-10.part-0").write_bytes(b"")
    assert run(state_dir) == {}
    (kept,) = (state_dir / "not-rebuilt").iterdir()
    assert (kept / "snapshots" / manifest.manifest_name(10)).exists()


def test_stores_elsewhere_are_looked_through(state_dir: Path, tmp_path: Path) -> None:
    save(at_home(state_dir), running(), 10)
    save(tmp_path / "shared" / "b", running("b"), 20)
    save(tmp_path / "shared" / "a", running(revision=20), 30)  # the same job, known better here
    found = run(state_dir, f"file://{tmp_path}/shared")
    assert found["b"].job.step == 20
    assert found["a"].job.step == 30


def test_code_comes_back_to_the_shelf(state_dir: Path) -> None:
    job = running(bundle_sha256=SHA256)
    save(at_home(state_dir), job, 10)
    open_store(at_home(state_dir)).write(manifest.bundle_name(SHA256), [BUNDLE])
    assert run(state_dir)["a"].problems == ()
    assert (state_dir / "bundles" / f"{SHA256}.tar.gz").read_bytes() == BUNDLE
    with closing(SqliteStore(state_dir / DATABASE)) as store:
        assert SHA256 in {bundle.sha256 for bundle in store.bundles()}


@pytest.mark.parametrize("data", [b"other", None], ids=["changed", "gone"])
def test_code_that_is_not_what_it_was_is_told(state_dir: Path, data: bytes | None) -> None:
    save(at_home(state_dir), running(bundle_sha256=SHA256), 10)
    if data is not None:
        open_store(at_home(state_dir)).write(manifest.bundle_name(SHA256), [data])
    (error,) = run(state_dir)["a"].problems
    assert "its code cannot be restored" in error
    assert not (state_dir / "bundles" / f"{SHA256}.tar.gz").exists()


def test_jobs_in_a_shared_store_come_back_from_both_layouts_and_no_other_cluster_s(
    state_dir: Path, tmp_path: Path
) -> None:
    shared, own = tmp_path / "shared", cluster_id_of(state_dir)
    save(shared / "old", running("old"), 10)
    save(shared / own / "new", running("new"), 10)
    save(shared / ("f" * 16) / "theirs", running("theirs"), 10)
    found = run(state_dir, str(shared))
    assert {job_id: one.job.store for job_id, one in found.items()} == {
        "old": str(shared / "old"),
        "new": str(shared / own / "new"),
    }


def test_members_of_a_sound_database_stay_members(state_dir: Path) -> None:
    token = TokenRecord(digest="a1", role=Role.WORKER, created_s=1.0, expires_s=2.0)
    with closing(SqliteStore(state_dir / DATABASE)) as store:
        store.write(Batch(tokens=(token,)))
    run(state_dir)
    with closing(SqliteStore(state_dir / DATABASE)) as store:
        assert store.access().tokens == {"a1": token}


def test_the_command_says_that_revocations_are_lost(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Authority.create(state_dir / CERTIFICATES, cluster_id_of(state_dir))
    (state_dir / DATABASE).write_bytes(b"garbage" * 1000)
    save(at_home(state_dir), running(), 10)
    assert daemon.run(["rebuild", "--state-dir", str(state_dir)]) == 0
    assert "psctl certs revoke" in capsys.readouterr().out


def test_a_sound_database_is_not_replaced(state_dir: Path) -> None:
    save(at_home(state_dir), running(), 10)
    with closing(SqliteStore(state_dir / DATABASE)) as store:
        store.write(Batch(jobs=(make_job("other"),)))
    with pytest.raises(StateError, match="1 jobs"):
        rebuild.rebuild(state_dir, (), NOW_S)


def test_a_damaged_database_is_kept_beside_the_new_one(state_dir: Path) -> None:
    save(at_home(state_dir), running(), 10)
    (state_dir / DATABASE).write_bytes(b"garbage" * 1000)
    assert set(run(state_dir)) == {"a"}
    assert (state_dir / f"{DATABASE}.damaged-{NOW_S:.0f}").read_bytes() == b"garbage" * 1000


def test_a_master_does_not_start_over_jobs_that_it_does_not_know(state_dir: Path) -> None:
    refuse_unclaimed(state_dir)
    save(at_home(state_dir), running(), 10)
    for _ in range(2):
        with pytest.raises(DamagedError, match="is gone, but there are snapshots of a") as refused:
            refuse_unclaimed(state_dir)
        assert "psmaster rebuild" in refused.value.action
        (state_dir / DATABASE).touch()  # a file that lost its content is no better
    run(state_dir)
    refuse_unclaimed(state_dir)


def test_the_command_says_what_came_back(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(at_home(state_dir), running(), 10)
    assert daemon.run(["rebuild", "--state-dir", str(state_dir)]) == 0
    assert capsys.readouterr().out == "a  stopped  step 10\n"
    assert daemon.run(["rebuild", "--state-dir", str(state_dir)]) == 1
    assert "PS-1004" in capsys.readouterr().err
    assert os.listdir(state_dir / "jobs") == ["a"]
