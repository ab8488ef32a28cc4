"""What every store promises, checked on each."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pscluster.errors import StateError, StorageError
from pscluster.security.identity import Role
from psmaster.model import job as jobs
from psmaster.model.access import AccessRecords, CertificateRecord, TokenRecord
from psmaster.model.job import Event, Recovery
from psmaster.model.plan import Part, ProcessKind
from psmaster.model.state import Deletion
from psmaster.storage.sqlite import SqliteStore
from psmaster.storage.store import SCHEMA_VERSION, Batch, BundleRecord, Store
from tests.harness.master_world import full_job, make_job
from tests.harness.memory_store import MemoryStore

PART = Part(step=10, partition=1, generation=2, path="p", size_bytes=7, checksum="crc32c:1")
BUNDLE = BundleRecord(sha256="ab" * 32, size_bytes=3, created_s=1.5)


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "master.db")
    yield made
    made.close()


def event(number: int = 1) -> Event:
    return Event(time_s=float(number), reason="Something", message=f"number {number}", warning=True, seconds=2.5)


def test_a_new_store_is_empty(store: Store) -> None:
    assert store.jobs() == ()
    assert store.bundles() == ()
    assert store.events("x") == ()
    assert store.parts("x") == ()


def test_a_job_comes_back_as_it_was_but_for_what_is_volatile(store: Store) -> None:
    job = full_job()
    volatile = replace(job, deadline_s=5.0, recovery=Recovery(kind=ProcessKind.TRAINER, since_s=1.0))
    store.write(Batch(jobs=(volatile,)))
    assert store.jobs() == (job,)


def test_jobs_come_oldest_first(store: Store) -> None:
    store.write(Batch(jobs=(make_job("b", created_s=2.0), make_job("c", created_s=1.0), make_job("a", created_s=2.0))))
    assert [job.job_id for job in store.jobs()] == ["c", "a", "b"]


def test_a_job_is_replaced_under_its_id(store: Store) -> None:
    job = make_job()
    store.write(Batch(jobs=(job,)))
    store.write(Batch(jobs=(replace(job, step=7, layout_json=b"L", layout_sha256="x"),)))
    store.write(Batch(jobs=(replace(job, step=8, layout_json=b"L2", layout_sha256="y"),)))
    (found,) = store.jobs()
    assert (found.step, found.layout_json) == (8, b"L2")
    store.write(Batch(jobs=(replace(job, step=9),)))
    assert store.jobs()[0].layout_json == b""


def test_a_request_creates_one_job(store: Store) -> None:
    store.write(Batch(jobs=(make_job("a"),)))
    stolen = replace(make_job("b"), request_id="request of a")
    with pytest.raises(StateError, match=r"\ba\b"):
        store.write(Batch(jobs=(make_job("c"), stolen), events=(("c", event()),)))
    assert [job.job_id for job in store.jobs()] == ["a"], "a refused batch leaves nothing behind"
    assert store.events("c") == ()


def test_jobs_without_a_request_do_not_collide(store: Store) -> None:
    store.write(Batch(jobs=(replace(make_job("a"), request_id=""), replace(make_job("b"), request_id=""))))
    assert len(store.jobs()) == 2


def test_events_come_in_order_and_the_newest_are_kept(store: Store) -> None:
    store.write(Batch(jobs=(make_job("a"), make_job("b")), events=(("b", event(0)),)))
    for start in range(0, 450, 50):
        store.write(Batch(events=tuple(("a", event(number)) for number in range(start, start + 50))))
    assert store.events("a") == tuple(event(number) for number in range(450 - jobs.MAX_EVENTS, 450))
    assert store.events("b") == (event(0),)


def test_parts_are_put_replaced_and_dropped(store: Store) -> None:
    other = replace(PART, step=20)
    store.write(Batch(jobs=(make_job("a"), make_job("b")), parts=(("a", other), ("a", PART), ("b", PART))))
    assert store.parts("a") == (PART, other)
    newer = replace(PART, generation=5)
    store.write(Batch(parts=(("a", newer),), dropped_parts=(("a", 20, 1), ("a", 99, 0))))
    assert store.parts("a") == (newer,)
    assert store.parts("b") == (PART,)


def test_a_deleted_job_takes_everything_with_it(store: Store) -> None:
    store.write(Batch(jobs=(full_job(), make_job("b"))))
    job_id = full_job().job_id
    store.write(Batch(events=((job_id, event()),), parts=((job_id, PART),)))
    store.write(Batch(deleted_jobs=(job_id,)))
    assert [job.job_id for job in store.jobs()] == ["b"]
    assert store.events(job_id) == ()
    assert store.parts(job_id) == ()
    store.write(Batch(jobs=(replace(make_job("another"), request_id=full_job().request_id),)))
    store.write(Batch(jobs=(make_job(job_id),)))
    assert store.events(job_id) == ()
    store.write(Batch(deleted_jobs=("nobody",)))


def test_bundles_are_known_and_forgotten(store: Store) -> None:
    store.write(Batch(bundles=(BUNDLE,)))
    store.write(Batch(bundles=(BUNDLE,)))
    assert store.bundles() == (BUNDLE,)
    store.write(Batch(deleted_bundles=(BUNDLE.sha256, "nobody")))
    assert store.bundles() == ()


def test_drains_are_kept_and_forgotten(store: Store) -> None:
    assert store.drains() == {}
    store.write(Batch(drained=(("worker-0", 1.5), ("server-1", 2.5))))
    store.write(Batch(drained=(("worker-0", 1.5),), undrained=("server-1", "nobody")))
    assert store.drains() == {"worker-0": 1.5}


def test_deletions_are_kept_in_their_order_and_forgotten(store: Store) -> None:
    assert store.deletions() == {}
    store.write(Batch(jobs=(make_job("a"),)))
    first, second = (Deletion(job_id=i, store=f"s3://b/{i}", deleted_s=s) for i, s in (("b", 1.5), ("a", 2.5)))
    store.write(Batch(deleted_jobs=("a",), deletions=(second, first)))
    assert store.jobs() == ()
    assert list(store.deletions().items()) == [("b", first), ("a", second)]
    gone = replace(first, removed=True)
    store.write(Batch(deletions=(gone,), forgotten_deletions=("a", "nobody")))
    assert store.deletions() == {"b": gone}


def test_tokens_and_certificates_are_kept_replaced_and_dropped(store: Store) -> None:
    assert store.access() == AccessRecords()
    token = TokenRecord(digest="a1", role=Role.WORKER, created_s=1.5, expires_s=9.5)
    older = TokenRecord(digest="b2", role=Role.ADMIN, created_s=0.5, expires_s=9.5, uses_left=3)
    made = CertificateRecord(
        serial="ff", role=Role.USER, name="alice", key_sha256="k", issued_s=2.5, expires_s=8.5, revoked=True
    )
    first = replace(made, serial="ee", issued_s=1.5, revoked=False)
    store.write(Batch(tokens=(token, older), certificates=(made, first)))
    found = store.access()
    assert list(found.tokens.items()) == [("b2", older), ("a1", token)]
    assert list(found.certificates.items()) == [("ee", first), ("ff", made)]
    used, refused = replace(older, uses_left=2), replace(first, revoked=True)
    store.write(
        Batch(
            tokens=(used,), certificates=(refused,), dropped_tokens=("a1", "nobody"), dropped_certificates=("ff", "0")
        )
    )
    assert store.access() == AccessRecords(tokens={"b2": used}, certificates={"ee": refused})


# what only the durable one promises


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "master.db"


def test_what_was_written_is_there_without_a_close(path: Path, tmp_path: Path) -> None:
    first = SqliteStore(path)
    first.write(Batch(jobs=(full_job(),), events=(("job-aaaaaa", event()),), parts=(("job-aaaaaa", PART),)))
    # The disk as a killed process leaves it: what is in the files now, the log not merged.
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for file in tmp_path.glob("master.db*"):
        shutil.copy(file, crashed / file.name)
    second = SqliteStore(crashed / "master.db")
    assert second.jobs() == (full_job(),)
    assert second.events("job-aaaaaa") == (event(),)
    assert second.parts("job-aaaaaa") == (PART,)
    second.close()
    first.close()


def test_closing_twice_is_harmless(path: Path) -> None:
    store = SqliteStore(path)
    store.write(Batch(jobs=(full_job(),)))
    store.close()
    closed = path.read_bytes()
    store.close()
    assert path.read_bytes() == closed
    assert not list(path.parent.glob("master.db-*"))  # the log is merged, nothing is open
    again = SqliteStore(path)
    assert again.jobs() == (full_job(),)
    again.close()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.99])
def test_a_torn_log_loses_whole_batches_only(path: Path, tmp_path: Path, kept: float) -> None:
    first = SqliteStore(path)
    for step in range(1, 21):
        job = replace(make_job(), step=step)
        first.write(Batch(jobs=(job,), parts=(("job-aaaaaa", replace(PART, step=step)),)))
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    shutil.copy(path, crashed / "master.db")
    log = (tmp_path / "master.db-wal").read_bytes()
    (crashed / "master.db-wal").write_bytes(log[: int(len(log) * kept)])
    first.close()
    try:
        second = SqliteStore(crashed / "master.db")
    except StorageError:
        pytest.fail("a torn log must not keep the master from starting")
    found = second.jobs()
    assert len(found) <= 1
    for job in found:
        assert [part.step for part in second.parts("job-aaaaaa")] == list(range(1, job.step + 1))
    second.close()


def test_it_is_written_through_and_has_a_version(path: Path) -> None:
    store = SqliteStore(path)
    store.close()
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    database.close()


def test_a_newer_schema_is_refused(path: Path) -> None:
    SqliteStore(path).close()
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    database.close()
    with pytest.raises(StorageError, match="newer psmaster"):
        SqliteStore(path)


def test_what_is_no_database_is_refused_by_name(path: Path) -> None:
    path.write_bytes(b"this is no database, but it is long enough to look at" * 20)
    with pytest.raises(StorageError):
        SqliteStore(path)


def test_a_directory_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        SqliteStore(tmp_path / "nowhere" / "master.db")


def test_a_full_disk_changes_nothing_and_heals(path: Path) -> None:
    store = SqliteStore(path)
    store.write(Batch(jobs=(make_job("a"),)))
    limit: Callable[[int], object] = lambda pages: store._db.execute(f"PRAGMA max_page_count={pages}").fetchone()  # noqa: E731
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    limit(pages)
    big = replace(make_job("b"), layout_json=b"x" * 100_000, layout_sha256="b")
    with pytest.raises(StorageError, match="full"):
        store.write(Batch(jobs=(make_job("c"), big)))
    assert [job.job_id for job in store.jobs()] == ["a"]
    limit(1_000_000)
    store.write(Batch(jobs=(make_job("c"), big)))
    assert [job.job_id for job in store.jobs()] == ["a", "b", "c"]
    store.close()
