"""The durable store: one SQLite file in WAL mode, `synchronous=FULL`, one writer.

Every batch is one transaction. Every row carries a checksum, checked when the file is opened (see `integrity`). A file
of an older version is brought forward step by step, a newer one is refused: a downgrade must not lose what it cannot
read."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from pscluster.errors import StateError, StorageError
from pscluster.security.identity import Role
from psmaster.model.access import AccessRecords, CertificateRecord, TokenRecord
from psmaster.model.job import MAX_EVENTS, Event, Job
from psmaster.model.plan import Part
from psmaster.model.state import Deletion, Deletions
from psmaster.storage import integrity, records
from psmaster.storage.store import SCHEMA_VERSION, Batch, BundleRecord, Store

DATABASE = "master.db"  # in the master's state directory

# One entry for each version: what brings a file of the version before to it.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE jobs (
            job_id TEXT PRIMARY KEY, request_id TEXT UNIQUE, created_s REAL NOT NULL, record TEXT NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE layouts (
            job_id TEXT PRIMARY KEY REFERENCES jobs ON DELETE CASCADE, sha256 TEXT NOT NULL, layout BLOB NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE events (
            sequence INTEGER PRIMARY KEY, job_id TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, record TEXT NOT NULL
        )""",
        "CREATE INDEX events_of_job ON events (job_id, sequence)",
        """CREATE TABLE parts (
            job_id TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, step INTEGER NOT NULL, part INTEGER NOT NULL,
            generation INTEGER NOT NULL, path TEXT NOT NULL, size_bytes INTEGER NOT NULL, checksum TEXT NOT NULL,
            PRIMARY KEY (job_id, step, part)
        ) WITHOUT ROWID""",
        """CREATE TABLE bundles (
            sha256 TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, created_s REAL NOT NULL
        ) WITHOUT ROWID""",
    ),
    ("CREATE TABLE drains (node_id TEXT PRIMARY KEY, since_s REAL NOT NULL) WITHOUT ROWID",),
    integrity.migration(),
    (
        """CREATE TABLE deletions (
            job_id TEXT PRIMARY KEY, store TEXT NOT NULL, deleted_s REAL NOT NULL, removed INTEGER NOT NULL,
            crc INTEGER NOT NULL
        ) WITHOUT ROWID""",
        *integrity.keep_books("deletions"),
    ),
    (),  # fields of records were renamed: `records` reads both names, a 0.1 master would lose the new ones
    (
        """CREATE TABLE tokens (
            digest TEXT PRIMARY KEY, role TEXT NOT NULL, created_s REAL NOT NULL, expires_s REAL NOT NULL,
            uses_left INTEGER, crc INTEGER NOT NULL
        ) WITHOUT ROWID""",
        *integrity.keep_books("tokens"),
        """CREATE TABLE certificates (
            serial TEXT PRIMARY KEY, role TEXT NOT NULL, name TEXT NOT NULL, key_sha256 TEXT NOT NULL,
            issued_s REAL NOT NULL, expires_s REAL NOT NULL, revoked INTEGER NOT NULL, crc INTEGER NOT NULL
        ) WITHOUT ROWID""",
        *integrity.keep_books("certificates"),
    ),
)


_PART_FIELDS = tuple(own.name for own in fields(Part))  # the columns after job_id, in this order; nodes is the last


class SqliteStore(Store):
    """Owns its connection. Create it in any thread; use it from one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError when it cannot be opened or is newer, DamagedError when it is not what was written."""
        self._path = path
        integrity.check_head(path)
        integrity.check_log(path)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        except sqlite3.Error as error:
            raise StorageError(f"cannot open {path}: {error}") from None
        try:
            with integrity.damage_named(path):
                self._configure()
                self._migrate()
            integrity.check(self._db, path)
        except BaseException:
            self._db.close()
            raise

    def _configure(self) -> None:
        (mode,) = self._db.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise StorageError(f"{self._path} cannot use a write-ahead log (its file system gave {mode})")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        integrity.prepare(self._db)

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StorageError(
                f"{self._path} was written by a newer psmaster (schema {version}, this one knows {SCHEMA_VERSION})",
                action="run the newer version, or give another --state-dir; if there is none, the file is damaged: "
                + integrity.REBUILD,
            )
        for number in range(version, SCHEMA_VERSION):
            with self._transaction():
                for statement in _MIGRATIONS[number]:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={number + 1}")

    def write(self, batch: Batch) -> None:
        with self._named("write to"), self._transaction():
            for job in batch.jobs:
                self._write_job(job)
            self._write_events(batch)
            self._db.executemany("DELETE FROM parts WHERE job_id=? AND step=? AND part=?", batch.dropped_parts)
            self._db.executemany(integrity.replace("parts"), map(_part_row, batch.parts))
            self._db.executemany(integrity.replace("bundles"), map(astuple, batch.bundles))
            self._db.executemany("DELETE FROM bundles WHERE sha256=?", [(sha256,) for sha256 in batch.deleted_bundles])
            self._db.executemany(integrity.replace("drains"), batch.drained)
            self._db.executemany("DELETE FROM drains WHERE node_id=?", [(node_id,) for node_id in batch.undrained])
            self._db.executemany("DELETE FROM jobs WHERE job_id=?", [(job_id,) for job_id in batch.deleted_jobs])
            self._db.executemany(integrity.replace("deletions"), map(astuple, batch.deletions))
            forgotten = [(job_id,) for job_id in batch.forgotten_deletions]
            self._db.executemany("DELETE FROM deletions WHERE job_id=?", forgotten)
            self._write_access(batch)

    def _write_access(self, batch: Batch) -> None:
        self._db.executemany(integrity.replace("tokens"), map(astuple, batch.tokens))
        self._db.executemany("DELETE FROM tokens WHERE digest=?", [(digest,) for digest in batch.dropped_tokens])
        self._db.executemany(integrity.replace("certificates"), map(astuple, batch.certificates))
        dropped = [(serial,) for serial in batch.dropped_certificates]
        self._db.executemany("DELETE FROM certificates WHERE serial=?", dropped)

    def _write_job(self, job: Job) -> None:
        try:
            self._db.execute(
                integrity.insert("jobs") + " ON CONFLICT (job_id) DO UPDATE SET request_id=excluded.request_id, "
                "created_s=excluded.created_s, record=excluded.record, crc=excluded.crc",
                (job.job_id, job.request_id or None, job.created_s, records.job_text(job)),
            )
        except sqlite3.IntegrityError:
            ((holder,),) = self._rows("SELECT job_id FROM jobs WHERE request_id=?", job.request_id)
            raise StateError(f"request {job.request_id} has created job {holder} already") from None
        if not job.layout_json:
            self._db.execute("DELETE FROM layouts WHERE job_id=?", (job.job_id,))
            return
        self._db.execute(
            integrity.insert("layouts") + " ON CONFLICT (job_id) DO UPDATE "
            "SET sha256=excluded.sha256, layout=excluded.layout, crc=excluded.crc WHERE sha256 != excluded.sha256",
            (job.job_id, job.layout_sha256, job.layout_json),
        )

    def _write_events(self, batch: Batch) -> None:
        (last,) = self._db.execute("SELECT coalesce(max(sequence), 0) FROM events").fetchone()
        for sequence, (job_id, event) in enumerate(batch.events, start=last + 1):
            self._db.execute(integrity.insert("events"), (sequence, job_id, records.event_text(event)))
        for job_id in {job_id for job_id, _ in batch.events}:
            self._db.execute(
                "DELETE FROM events WHERE job_id=?1 AND sequence <= "
                "(SELECT sequence FROM events WHERE job_id=?1 ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
                (job_id, MAX_EVENTS),
            )

    def jobs(self) -> tuple[Job, ...]:
        query = "SELECT record, layout FROM jobs LEFT JOIN layouts USING (job_id) ORDER BY created_s, job_id"
        return tuple(records.job_of(text, layout or b"") for text, layout in self._rows(query))

    def events(self, job_id: str) -> tuple[Event, ...]:
        rows = self._rows("SELECT record FROM events WHERE job_id=? ORDER BY sequence", job_id)
        return tuple(records.event_of(text) for (text,) in rows)

    def parts(self, job_id: str) -> tuple[Part, ...]:
        columns = ", ".join(name.replace("partition", "part") for name in _PART_FIELDS)
        rows = self._rows(f"SELECT {columns} FROM parts WHERE job_id=? ORDER BY step, part", job_id)
        return tuple(Part(**dict(zip(_PART_FIELDS, (*row, tuple(nodes.split())), strict=True))) for *row, nodes in rows)

    def bundles(self) -> tuple[BundleRecord, ...]:
        rows = self._rows("SELECT sha256, size_bytes, created_s FROM bundles ORDER BY sha256")
        return tuple(BundleRecord(sha256=row[0], size_bytes=row[1], created_s=row[2]) for row in rows)

    def drains(self) -> Mapping[str, float]:
        return dict(self._rows("SELECT node_id, since_s FROM drains"))

    def deletions(self) -> Deletions:
        rows = self._rows("SELECT job_id, store, deleted_s, removed FROM deletions ORDER BY deleted_s, job_id")
        return {
            job_id: Deletion(job_id=job_id, store=store, deleted_s=deleted_s, removed=bool(removed))
            for job_id, store, deleted_s, removed in rows
        }

    def access(self) -> AccessRecords:
        tokens = [
            TokenRecord(digest=digest, role=Role(role), created_s=created_s, expires_s=expires_s, uses_left=uses_left)
            for digest, role, created_s, expires_s, uses_left in self._rows(
                "SELECT digest, role, created_s, expires_s, uses_left FROM tokens ORDER BY created_s, digest"
            )
        ]
        certificates = [
            CertificateRecord(
                serial=serial, role=Role(role), name=name, key_sha256=key, issued_s=issued_s, expires_s=expires_s,
                revoked=bool(revoked),
            )
            for serial, role, name, key, issued_s, expires_s, revoked in self._rows(
                "SELECT serial, role, name, key_sha256, issued_s, expires_s, revoked FROM certificates "
                "ORDER BY issued_s, serial"
            )
        ]  # fmt: skip
        return AccessRecords(
            tokens={one.digest: one for one in tokens}, certificates={one.serial: one for one in certificates}
        )

    def _rows(self, query: str, *parameters: str) -> list[Any]:
        with self._named("read"):
            return self._db.execute(query, parameters).fetchall()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing. A failed commit rolls back too: SQLite leaves that to the caller."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
            raise StorageError(
                f"cannot {doing} {self._path}: {error}",
                action="free space; nothing was acknowledged, and writing is tried again" if full else "",
            ) from error


def _part_row(entry: tuple[str, Part]) -> tuple[Any, ...]:
    job_id, part = entry
    return (job_id, *(getattr(part, name) for name in _PART_FIELDS[:-1]), " ".join(part.nodes))
