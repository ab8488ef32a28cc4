"""A job's logs on disk: one file per placement, `<trainer|partition>-<rank>.log`, a JSON object per line, bounded.

    {"t": Unix time, "s": "stdout", "x": text, "a": attempt, "q": sequence of the agent's message}

A file that passes 16 MiB becomes `<name>.log.1` (one older is kept). A repeated message is recognised by its sequence.
Everything here blocks on the disk."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pscluster.errors import StorageError
from psmaster.model.plan import ProcessKind
from psmaster.storage.metrics_file import append_whole

MAX_BYTES = 16 << 20
_TAIL_BYTES = 1 << 20  # at least one whole message lies in it
_NAME = re.compile(r"(trainer|partition)-(\d+)\.log")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogEntry:
    """One line of one process's output."""

    source: str  # "trainer-0"
    time_s: float
    stream: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LogMessage:
    """What an agent sent at once. `dropped`: lines that were lost before these."""

    source: str
    attempt: int
    sequence: int
    lines: tuple[tuple[float, str, str], ...]  # (Unix time, stream, text)
    dropped: int = 0


class ProcessLog:
    """Writes one placement's log. Used from one thread at a time."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._last = _last_sequences(path)
        self._size = path.stat().st_size if path.exists() else 0

    def append(self, message: LogMessage) -> bool:
        """Write the message once; False for a repeat. Raises StorageError; then nothing of it was written."""
        if message.sequence <= self._last.get(message.attempt, 0):
            return False
        data = b"".join(_lines_of(message))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._size + len(data) > self._max_bytes and self._size:
                self._path.replace(older(self._path))
                self._size = 0
            append_whole(self._path, data)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error
        self._size += len(data)
        self._last[message.attempt] = message.sequence
        return True


def older(path: Path) -> Path:
    """Where a full log goes."""
    return path.with_name(path.name + ".1")


def _lines_of(message: LogMessage) -> Iterator[bytes]:
    lines = message.lines
    if message.dropped:
        first = lines[0][0] if lines else 0.0
        lines = ((first, "stderr", f"[{message.dropped} lines were lost here: too many at once]"), *lines)
    for time_s, stream, text in lines:
        data = {"t": time_s, "s": stream, "x": text, "a": message.attempt, "q": message.sequence}
        yield json.dumps(data, separators=(",", ":")).encode() + b"\n"


def _last_sequences(path: Path) -> dict[int, int]:
    """The last sequence of each attempt near the end of a log, whose torn end is cut off; also of the older file."""
    last: dict[int, int] = {}
    for candidate in (older(path), path):
        if not candidate.exists():
            continue
        with candidate.open("r+b") as file:
            size = file.seek(0, 2)
            start = file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            whole = tail.rfind(b"\n") + 1
            if whole < len(tail):
                file.truncate(start + whole)
        for raw in tail[:whole].splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the cut beginning of the tail
                data = json.loads(raw)
                attempt, sequence = int(data["a"]), int(data["q"])
                last[attempt] = max(last.get(attempt, 0), sequence)
    return last


def paths_of(directory: Path, kind: str = "", rank: int = -1) -> list[Path]:
    """A job's logs below `directory`, trainers first, by rank. `kind` empty: both; `rank` -1: all."""
    found: list[tuple[int, int, Path]] = []
    for path in directory.glob("*.log") if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and kind in ("", match[1]) and rank in (-1, int(match[2])):
            found.append((list(ProcessKind).index(ProcessKind(match[1])), int(match[2]), path))
    return [path for _, _, path in sorted(found)]


class LogReader:
    """Reads a job's logs from their beginning and then whatever was added. Used from one thread at a time."""

    def __init__(self, directory: Path, kind: str = "", rank: int = -1) -> None:
        self._directory = directory
        self._kind = kind
        self._rank = rank
        self._at: dict[Path, tuple[int, int]] = {}  # (inode, offset) up to which a log was read

    def read(self) -> list[LogEntry]:
        """What was added since the last call, by time. Bounded by what the files hold."""
        entries: list[LogEntry] = []
        for path in paths_of(self._directory, self._kind, self._rank):
            entries += self._read_one(path)
        return sorted(entries, key=lambda entry: entry.time_s)

    def _read_one(self, path: Path) -> Sequence[LogEntry]:
        inode, offset = self._at.get(path, (0, 0))
        entries: list[LogEntry] = []
        try:
            current = path.stat().st_ino
            if current != inode:
                entries += _rest_of_older(older(path), inode, offset)
                inode, offset = current, 0
            lines, offset = whole_lines(path, offset)
        except FileNotFoundError:
            return entries  # rotated this very moment: the next call finds it
        self._at[path] = (inode, offset)
        return [*entries, *_parsed(path.stem, lines)]


def _rest_of_older(path: Path, inode: int, offset: int) -> Iterator[LogEntry]:
    """What a reader that was at `offset` of file `inode` has not read of the older file."""
    if path.exists():
        lines, _ = whole_lines(path, offset if path.stat().st_ino == inode else 0)
        yield from _parsed(path.name.removesuffix(".log.1"), lines)


def whole_lines(path: Path, offset: int) -> tuple[list[bytes], int]:
    """The complete lines of a file from `offset` on, and the offset after them. Raises FileNotFoundError."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data.rfind(b"\n") + 1
    return data[:whole].splitlines(), offset + whole


def _parsed(source: str, lines: Iterable[bytes]) -> Iterator[LogEntry]:
    for raw in lines:
        try:
            data = json.loads(raw)
            yield LogEntry(source=source, time_s=float(data["t"]), stream=str(data["s"]), text=str(data["x"]))
        except (ValueError, KeyError, TypeError):
            yield LogEntry(source=source, time_s=0.0, stream="stderr", text="[a line of this log is damaged]")
