"""A master with a database older than the snapshots does not start, and removes nothing; any other one starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pscluster.errors import DamagedError
from psmaster.control.loop import ControlLoop, clock
from psmaster.model.job import Best, Job, JobState
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.model.state import Changes, Deletion, State
from psmaster.server import MasterSettings
from psmaster.storage import manifest, orphans, rebuild
from psmaster.storage.manifest_publisher import Publisher
from psmaster.storage.metrics_file import MetricsFile
from psmaster.storage.persistence import Archive, Writes, batch_of
from psmaster.storage.sqlite import DATABASE, SqliteStore
from psmaster.storage.store import Batch
from tests.harness.master_world import make_record
from tests.unit.master.test_deletion import parts_of
from tests.unit.master.test_manifest_publisher import complete
from tests.unit.master.test_rebuild import NOW_S, at_home, running, save
from tests.unit.master.test_service import Client, with_master


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def stored(site: MasterSettings, *jobs: Job, deletions: tuple[Deletion, ...] = ()) -> None:
    """A database with these jobs, whose snapshots are at home, and the parts that their manifests name."""
    site.state_dir.mkdir(exist_ok=True)
    jobs = tuple(replace(job, store=str(at_home(site.state_dir, job.job_id))) for job in jobs)
    parts = [part for job in jobs for part in parts_of(at_home(site.state_dir, job.job_id), job)]
    with closing(SqliteStore(site.state_dir / DATABASE)) as store:
        store.write(Batch(jobs=jobs, parts=tuple(parts), deletions=deletions))


def known(site: MasterSettings) -> set[str]:
    """The jobs that a master knows that starts and ends in good order."""
    found: set[str] = set()

    async def test(_client: Client, core: ControlLoop) -> None:
        found.update(core.state.jobs)

    with_master(site, test)
    return found


def test_a_backup_of_the_database_is_refused_and_nothing_is_removed(site: MasterSettings) -> None:
    """The job has two newer snapshots, and there is one that was not submitted yet."""
    home = at_home(site.state_dir)
    save(home, running(revision=5), 10)
    stored(site, running(revision=5))
    save(home, running(revision=7), 20)
    save(home, running(revision=9), 30)
    save(at_home(site.state_dir, "b"), running("b", revision=0), 10)
    MetricsFile(home.parent).append([make_record(30)])
    before = files(site.state_dir / "jobs")

    for _ in range(2):
        with pytest.raises(DamagedError, match=r"master\.db .* a, b ") as refused:
            known(site)
        assert "psmaster rebuild" in refused.value.action
        assert files(site.state_dir / "jobs") == before

    (site.state_dir / DATABASE).rename(site.state_dir / "older.db")
    brought = rebuild.rebuild(site.state_dir, (), NOW_S)
    assert {one.job.job_id: one.job.step for one in brought} == {"a": 30, "b": 10}
    assert known(site) == {"a", "b"}


@pytest.mark.parametrize("revision", [9, 10])
def test_a_database_that_knows_as_much_or_more_is_not_older(site: MasterSettings, revision: int) -> None:
    save(at_home(site.state_dir), running(revision=4), 5)
    save(at_home(site.state_dir), running(revision=9), 10)
    stored(site, running(revision=revision))
    assert known(site) == {"a"}


def test_what_is_left_of_a_deleted_job_is_no_loss_and_goes(site: MasterSettings) -> None:
    """Whether its removal had begun, or was done but for the directory of a job that was thought to have none."""
    for job_id in ("b", "c"):
        save(at_home(site.state_dir, job_id), running(job_id), 10)
    going = Deletion(job_id="b", store=str(at_home(site.state_dir, "b")), deleted_s=clock().unix_s)
    stored(site, deletions=(going, replace(going, job_id="c", removed=True)))

    async def test(_client: Client, core: ControlLoop) -> None:
        while not core.state.deletions["b"].removed:
            await core.news.wait()

    with_master(site, test)
    assert files(site.state_dir / "jobs") == {}


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
def test_a_damaged_manifest_proves_nothing_and_an_unknown_job_with_one_is_left_alone(
    site: MasterSettings, is_known: bool
) -> None:
    save(at_home(site.state_dir), running(revision=9), 10)
    stored(site, *([running(revision=9)] if is_known else []))
    path = at_home(site.state_dir) / manifest.manifest_name(20)
    path.write_bytes(b"torn")
    if not is_known:
        path.with_name(manifest.manifest_name(10)).write_bytes(b"torn, too")
        before = files(site.state_dir / "jobs")
        known(site)
        assert files(site.state_dir / "jobs") == before, "nobody knows what it was"
    assert known(site) == ({"a"} if is_known else set())


def test_a_job_that_was_rebuilt_from_a_copy_does_not_answer_for_what_it_left(site: MasterSettings) -> None:
    save(at_home(site.state_dir), running(revision=9), 10)
    elsewhere = replace(running(revision=5), store="/somewhere/else")
    orphans.refuse_older(site.state_dir, {"a": elsewhere}, {})
    assert not orphans.may_go(site.state_dir / "jobs" / "a", {"a": elsewhere}, {})


def test_orphans_without_snapshots_are_removed(site: MasterSettings) -> None:
    (site.state_dir / "jobs" / "b" / "logs").mkdir(parents=True)
    assert known(site) == set()
    assert not (site.state_dir / "jobs" / "b").exists()


# ---- no false alarm: a master that is killed at any point of a write ----


@contextmanager
def killed(monkeypatch: pytest.MonkeyPatch, where: str) -> Iterator[None]:
    """Nothing is done any more from that point of a write on."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if where != "afterwards":
            patched.setattr(*{"store": (SqliteStore, "write"), "manifests": (Publisher, "publish")}[where], die)
        with suppress(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("where", ["store", "manifests", "afterwards"])
def test_a_killed_master_never_leaves_a_database_that_is_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A job takes snapshots, finds a best one, goes back and ends; after each write there is a new master."""
    job = running(store=str(at_home(tmp_path)), directory=str(tmp_path / "jobs" / "a"), revision=0)
    lives: list[tuple[Job, Catalogue]] = [
        (job, complete(job, 0)),
        (replace(job, best=Best(step=10, value=1.0)), complete(job, 0, 10)),
        (job, complete(job, 10, 20)),
        (replace(job, step=10), complete(job, 10)),
        (replace(job, state=JobState.SUCCEEDED), complete(job, 10, 30)),
    ]
    for revision, (changed, snapshots) in enumerate(lives, start=1):
        archive = Archive(SqliteStore(tmp_path / DATABASE), tmp_path)
        before = archive.load(clock())
        after = State(jobs={"a": replace(changed, revision=revision)}, catalogues={"a": snapshots}, events={"a": ()})
        changes = Changes(state=after, events=(), lines=(), cuts={})
        with killed(monkeypatch, where):
            archive.save(Writes(before=before, batch=batch_of(before, changes), changes=changes))
        archive.close()
    archive = Archive(SqliteStore(tmp_path / DATABASE), tmp_path)
    assert ("a" in archive.load(clock()).jobs) == (where != "store")
    archive.close()
