"""A database that is not what was written is refused by name, whichever byte it was."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pscluster.errors import DamagedError, StorageError
from pscluster.security.identity import Role
from psmaster.model.access import AccessRecords, CertificateRecord, TokenRecord
from psmaster.model.job import Event
from psmaster.model.plan import Part
from psmaster.model.state import Deletion
from psmaster.storage import integrity, sqlite
from psmaster.storage.sqlite import SqliteStore
from psmaster.storage.store import Batch, BundleRecord
from tests.harness.master_world import make_job

GONE = Deletion(job_id="gone", store="/store/gone", deleted_s=2.0)
TOKEN = TokenRecord(digest="a1", role=Role.WORKER, created_s=1.0, expires_s=2.0)
MEMBER = CertificateRecord(serial="ff", role=Role.USER, name="alice", key_sha256="k", issued_s=1.0, expires_s=2.0)
EVENT = Event(time_s=1.0, reason="Something", message="happened")
TABLES = ("jobs", "layouts", "events", "parts", "bundles", "deletions")


def part(step: int) -> Part:
    return Part(step=step, partition=0, generation=1, path=f"step-{step}", size_bytes=9, checksum="crc32c:0")


def content(path: Path) -> tuple[object, ...]:
    """All that a store tells; opened, read and closed. Raises what opening raises."""
    with closing(SqliteStore(path)) as store:
        jobs = store.jobs()
        ids = [job.job_id for job in jobs]
        return (jobs, [(store.events(i), store.parts(i)) for i in ids], store.bundles(), store.deletions())


def refusal(path: Path) -> str:
    """What to do, when the file is refused; empty when it is opened."""
    try:
        SqliteStore(path).close()
    except StorageError as error:
        return error.action
    return ""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "master.db"
    with closing(SqliteStore(path)) as store:
        job = replace(make_job("a"), layout_json=b"layout" * 50, layout_sha256="L")
        store.write(Batch(jobs=(job, make_job("b")), events=(("a", EVENT), ("b", EVENT)), parts=(("a", part(5)),)))
        store.write(
            Batch(
                events=(("a", EVENT),) * 20,
                bundles=(BundleRecord(sha256="c", size_bytes=1, created_s=2.0),),
                deletions=(GONE,),
            )
        )
    return path


def test_it_opens_as_it_was_written(database: Path) -> None:
    before = content(database)
    assert content(database) == before


def test_a_flipped_bit_is_refused_or_lies_where_nothing_is(database: Path) -> None:
    before, data = content(database), database.read_bytes()
    refused = 0
    offsets = [*range(100), *range(100, len(data), 97)]
    for offset in offsets:
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        database.write_bytes(changed)
        action = refusal(database)
        if action:
            assert "psmaster rebuild" in action, f"byte {offset}"
            refused += 1
        else:
            assert content(database) == before, f"byte {offset} was flipped, and nobody saw it"
        for end in ("-wal", "-shm"):
            database.with_name(database.name + end).unlink(missing_ok=True)
    assert refused > len(offsets) / 6, "most of a small file is free pages, but not all"


def test_a_file_that_was_cut_is_refused(database: Path) -> None:
    data = database.read_bytes()
    for length in range(1, len(data), 509):
        database.write_bytes(data[:length])
        with pytest.raises(DamagedError, match="is damaged") as refused:
            SqliteStore(database).close()
        assert "psmaster rebuild" in refused.value.action


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE jobs SET record = replace(record, '\"step\":0', '\"step\":7') WHERE job_id = 'a'",
        "UPDATE layouts SET layout = x'00'",
        "UPDATE parts SET size_bytes = 10",
        "UPDATE events SET job_id = 'b' WHERE sequence = 1",
        "UPDATE bundles SET created_s = 2.5",
        "UPDATE deletions SET removed = 1",
        "DELETE FROM deletions",
        "DELETE FROM parts",
        "DELETE FROM events WHERE sequence = 3",
        "INSERT INTO bundles SELECT 'd', 1, 2.0, crc FROM bundles",
        "DELETE FROM digests",
    ],
)
def test_rows_that_were_not_written_by_us_are_seen(database: Path, tampering: str) -> None:
    with closing(sqlite3.connect(database)) as db:
        for table in TABLES:
            for event in ("insert", "update", "delete"):
                db.execute(f"DROP TRIGGER {table}_{event}")
        assert db.execute(tampering).rowcount >= 1
        db.commit()
    with pytest.raises(DamagedError, match=r"table \w+ has"):
        SqliteStore(database)


def test_every_kind_of_change_keeps_the_books(tmp_path: Path) -> None:
    path = tmp_path / "master.db"
    with closing(SqliteStore(path)) as store:
        job = replace(make_job("a"), layout_json=b"L", layout_sha256="1")
        store.write(Batch(jobs=(job, make_job("b")), parts=(("a", part(1)), ("b", part(1)))))
        store.write(Batch(jobs=(replace(job, step=3, layout_json=b"LL", layout_sha256="2"),)))
        store.write(Batch(parts=(("a", replace(part(1), generation=2)),), dropped_parts=(("b", 1, 0),)))
        store.write(Batch(events=(("a", EVENT),) * 450))
        store.write(Batch(jobs=(replace(job, layout_json=b""),)))
        store.write(Batch(events=(("b", EVENT),), deleted_jobs=("a",), deletions=(GONE,)))
        store.write(Batch(deletions=(replace(GONE, removed=True), replace(GONE, job_id="c"))))
        store.write(Batch(forgotten_deletions=("gone",)))
        store.write(Batch(tokens=(TOKEN,), certificates=(MEMBER,)))
        store.write(Batch(tokens=(replace(TOKEN, uses_left=1),), certificates=(replace(MEMBER, revoked=True),)))
        store.write(Batch(tokens=(replace(TOKEN, digest="b2"),), dropped_tokens=("a1",), dropped_certificates=("ff",)))
        integrity.check(store._db, path)
    assert [job.job_id for job in content(path)[0]] == ["b"]  # type: ignore[attr-defined]


def test_a_database_of_schema_1_gets_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "master.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        for statement in sqlite._MIGRATIONS[0]:
            db.execute(statement)
        db.execute("INSERT INTO bundles VALUES ('c', 1, 2.0)")
        db.execute("PRAGMA user_version=1")
        db.commit()
    assert content(path)[2] == (BundleRecord(sha256="c", size_bytes=1, created_s=2.0),)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT num_rows FROM digests WHERE name = 'bundles'").fetchone() == (1,)


def test_a_database_of_schema_3_gets_its_list_of_deletions(tmp_path: Path) -> None:
    path = tmp_path / "master.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        integrity.prepare(db)
        for statement in [line for lines in sqlite._MIGRATIONS[:3] for line in lines]:
            db.execute(statement)
        db.execute(integrity.insert("bundles"), ("c", 1, 2.0))
        db.execute("PRAGMA user_version=3")
        db.commit()
    with closing(SqliteStore(path)) as store:
        assert store.deletions() == {}
        store.write(Batch(deletions=(GONE,)))
    with closing(SqliteStore(path)) as store:
        assert store.deletions() == {"gone": GONE}
        assert [bundle.sha256 for bundle in store.bundles()] == ["c"]


def test_a_database_of_schema_5_gets_its_members(tmp_path: Path) -> None:
    path = tmp_path / "master.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        integrity.prepare(db)
        for statement in [line for lines in sqlite._MIGRATIONS[:5] for line in lines]:
            db.execute(statement)
        db.execute(integrity.insert("drains"), ("worker-0", 2.0))
        db.execute("PRAGMA user_version=5")
        db.commit()
    with closing(SqliteStore(path)) as store:
        assert store.access() == AccessRecords()
        store.write(Batch(tokens=(TOKEN,), certificates=(MEMBER,)))
    with closing(SqliteStore(path)) as store:
        assert store.access() == AccessRecords(tokens={"a1": TOKEN}, certificates={"ff": MEMBER})
        assert store.drains() == {"worker-0": 2.0}


# ---- the log that a killed master leaves ----


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The files of a master that was killed after ten transactions; its log holds them all."""
    first = tmp_path / "first" / "master.db"
    first.parent.mkdir()
    with closing(SqliteStore(first)) as store:
        for step in range(1, 11):
            store.write(Batch(jobs=(replace(make_job("a"), step=step),), parts=(("a", part(step)),)))
        left = tmp_path / "left"
        shutil.copytree(first.parent, left)
    (left / "master.db-shm").unlink()
    return left / "master.db"


def steps(path: Path) -> list[int]:
    with closing(SqliteStore(path)) as store:
        return [part.step for part in store.parts("a")]


def test_a_log_that_is_sound_is_read_to_its_end(killed: Path) -> None:
    assert steps(killed) == list(range(1, 11))


def test_a_flip_in_the_midst_of_the_log_is_refused_not_forgotten(killed: Path) -> None:
    log = killed.with_name("master.db-wal")
    data = log.read_bytes()
    for offset in range(0, len(data) // 2, 4001):
        changed = bytearray(data)
        changed[offset] ^= 0x10
        log.write_bytes(changed)
        with pytest.raises(DamagedError, match=r"master\.db-wal is damaged in its midst") as refused:
            SqliteStore(killed)
        assert "psmaster rebuild" in refused.value.action
        assert log.read_bytes() == bytes(changed), "refusing it must not lose it"


def test_a_torn_end_of_the_log_is_what_a_crash_leaves(killed: Path) -> None:
    log = killed.with_name("master.db-wal")
    data = log.read_bytes()
    log.write_bytes(data[: len(data) - 100])
    found = steps(killed)
    assert found == list(range(1, 10)), "the one transaction that is torn was not acknowledged"
