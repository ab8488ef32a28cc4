"""Whether a database file is what was written to it. SQLite has no checksums of its own in the file, only in the log.

Three layers: SQLite's own check of its structure; a checksum in every row; and for each table the number of its rows
with the sum of their checksums, kept by triggers in the transaction that changed them, so that a row that vanished is
missed too. What lies in none of them (free pages) is never read.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import crc32c

from pscluster.errors import DamagedError, StorageError

REBUILD = "keep the file, then run `psmaster rebuild`: it makes a new one from the snapshots"

_COLUMNS = {
    "jobs": "job_id, request_id, created_s, record",
    "layouts": "job_id, sha256, layout",
    "events": "sequence, job_id, record",
    "parts": "job_id, step, part, generation, path, size_bytes, checksum, nodes",
    "bundles": "sha256, size_bytes, created_s",
    "drains": "node_id, since_s",
    "deletions": "job_id, store, deleted_s, removed",
    "tokens": "digest, role, created_s, expires_s, uses_left",
    "certificates": "serial, role, name, key_sha256, issued_s, expires_s, revoked",
}
_WITHOUT_CHECKSUMS = ("jobs", "layouts", "events", "parts", "bundles", "drains")  # the tables of schema 2
_NOT_DAMAGE = {
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("BUSY", "LOCKED", "NOMEM", "READONLY", "IOERR", "FULL", "CANTOPEN", "PERM", "AUTH")
}
_FRAME_HEADER_BYTES = 24
_LOG_HEADER_BYTES = 32
_LOG_MAGIC = 0x377F0682


def row_checksum(*values: object) -> int:
    """CRC-32C over a row's values, types and lengths included. In SQL: row_checksum('table', column, ...)."""
    total = 0
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        total = crc32c.crc32c(f"{type(value).__name__}:{len(data)}:".encode(), total)
        total = crc32c.crc32c(data, total)
    return total


def prepare(db: sqlite3.Connection) -> None:
    """Once for each connection, before anything is written."""
    db.create_function("row_checksum", -1, row_checksum, deterministic=True)
    db.execute("PRAGMA recursive_triggers=ON")  # or the rows that REPLACE takes away would still be counted


def migration() -> tuple[str, ...]:
    """The statements that give the tables of schema 2 their checksums."""
    statements = [
        "ALTER TABLE parts ADD COLUMN nodes TEXT NOT NULL DEFAULT ''",
        "CREATE TABLE digests (name TEXT PRIMARY KEY, num_rows INTEGER NOT NULL, total INTEGER NOT NULL) WITHOUT ROWID",
    ]
    for table in _WITHOUT_CHECKSUMS:
        statements += [
            f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0",
            f"UPDATE {table} SET crc = row_checksum('{table}', {_COLUMNS[table]})",
            *keep_books(table),
        ]
    return tuple(statements)


def keep_books(table: str) -> tuple[str, ...]:
    """The statements that begin to count a table's rows and to sum their checksums. It must have a column crc."""
    changes = {"INSERT": ("+ 1", "+ NEW.crc"), "DELETE": ("- 1", "- OLD.crc"), "UPDATE": ("+ 0", "+ NEW.crc - OLD.crc")}
    return (
        f"INSERT INTO digests SELECT '{table}', count(*), coalesce(sum(crc), 0) FROM {table}",
        *(
            f"CREATE TRIGGER {table}_{event.lower()} AFTER {event} ON {table} BEGIN UPDATE digests "
            f"SET num_rows = num_rows {rows}, total = total {total} WHERE name = '{table}'; END"
            for event, (rows, total) in changes.items()
        ),
    )


def insert(table: str) -> str:
    """INSERT INTO `table` of one row, with its checksum. Append what to do on conflict."""
    names = _COLUMNS[table].split(", ")
    values = ", ".join(f"?{number}" for number in range(1, len(names) + 1))
    return f"INSERT INTO {table} ({_COLUMNS[table]}, crc) VALUES ({values}, row_checksum('{table}', {values}))"


def replace(table: str) -> str:
    return insert(table).replace("INSERT", "INSERT OR REPLACE", 1)


def check(db: sqlite3.Connection, path: Path) -> None:
    """Read everything. Raises DamagedError naming the first thing that is not what was written."""
    with damage_named(path):
        found = [str(row[0]) for row in db.execute("PRAGMA integrity_check(3)")]
        if found != ["ok"]:
            raise DamagedError(f"{path} is damaged: {'; '.join(found)}", action=REBUILD)
        for table, columns in _COLUMNS.items():
            keep = db.execute("SELECT num_rows, total FROM digests WHERE name=?", (table,)).fetchone()
            rows, total, wrong = db.execute(
                f"SELECT count(*), coalesce(sum(crc), 0), coalesce(sum(crc != row_checksum('{table}', {columns})), 0) "
                f"FROM {table}"
            ).fetchone()
            if wrong or keep != (rows, total):
                what = f"{wrong} rows" if wrong else f"{rows} rows, which are not the {keep and keep[0]} written"
                raise DamagedError(f"{path} is damaged: table {table} has {what}", action=REBUILD)


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Tell SQLite's errors that mean damage from those of a disk or a lock. Raises DamagedError, StorageError."""
    try:
        yield
    except UnicodeDecodeError as error:  # of text in the schema, or in a message that quotes it
        raise DamagedError(f"{path} is damaged: {error}", action=REBUILD) from error
    except sqlite3.Error as error:
        kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if kind in _NOT_DAMAGE:
            raise StorageError(f"cannot read {path}: {error}") from error
        raise DamagedError(f"{path} is damaged: {error}", action=REBUILD) from error


def check_head(path: Path) -> None:
    """SQLite takes what is shorter than a page for a new file and begins in it, and overlooks that pages are missing
    which nothing refers to yet. Raises DamagedError for a file that was cut, StorageError when it cannot be read.

    An empty file is new: a kill may come right after its creation. With a log there is no telling: a killed master may
    have been about to copy pages from it."""
    try:
        with path.open("rb") as file:
            head, size = file.read(100), file.seek(0, 2)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None
    if size == 0:
        return
    page_bytes, num_pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
    whole = size >= page_bytes * (num_pages if not _log(path).exists() else 1)
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0") or page_bytes < 512 or not whole:
        raise DamagedError(f"{path} is damaged: it is no database of ours, or was cut", action=REBUILD)


def _log(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def check_log(path: Path) -> None:
    """Look at the write-ahead log that a killed master left, before SQLite does: it would silently end its reading at
    the first damaged frame, and drop what was acknowledged after it.

    The end of a log may be torn: that transaction was never acknowledged. But each was synced before the next began, so
    that two that end beyond a damaged frame prove that the damage came later. Raises DamagedError then, StorageError
    when it cannot be read. (A change in the last transaction alone looks like a torn end, and counts as one.)"""
    log = _log(path)
    try:
        data = log.read_bytes() if log.exists() else b""
    except OSError as error:
        raise StorageError(f"cannot read {log}: {error.strerror}") from None
    lost = _lost_commits(data)
    if lost >= 2:
        raise DamagedError(f"{log} is damaged in its midst: {lost} transactions after it would be lost", action=REBUILD)


def _lost_commits(data: bytes) -> int:
    """How many transactions end at or after the first frame that does not fit its checksum."""
    if len(data) < _LOG_HEADER_BYTES:
        return 0
    magic, _, page_bytes, _, *salts = struct.unpack_from(">6I", data)
    order = ">" if magic & 1 else "<"
    sums = _summed(data[:24], order, (0, 0))
    headed = sound = magic & ~1 == _LOG_MAGIC and struct.unpack_from(">2I", data, 24) == sums
    if not 512 <= page_bytes <= 65536 or page_bytes & (page_bytes - 1):
        return 2 if len(data) > _LOG_HEADER_BYTES else 0
    lost, frame_bytes = 0, _FRAME_HEADER_BYTES + page_bytes
    for at in range(_LOG_HEADER_BYTES, len(data) - frame_bytes + 1, frame_bytes):
        _, pages, *rest = struct.unpack_from(">6I", data, at)
        if sound:
            if rest[:2] != salts:
                break  # an older log's remains
            body = at + _FRAME_HEADER_BYTES
            sums = _summed(data[at : at + 8], order, sums)
            sums = _summed(data[body : body + page_bytes], order, sums)
            sound = tuple(rest[2:]) == sums
        if not sound and pages and (rest[:2] == salts or not headed):
            lost += 1
    return lost


def _summed(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    one, two = sums
    for left, right in struct.iter_unpack(f"{order}2I", data):
        one = (one + left + two) & 0xFFFFFFFF
        two = (two + right + one) & 0xFFFFFFFF
    return one, two
