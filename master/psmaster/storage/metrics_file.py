"""A job's metrics.jsonl: one JSON object per committed step and per evaluation.

Appending is idempotent: what is not newer than the last line of its kind is dropped. Going back cuts the file by
writing a new one beside it and renaming. Everything here blocks on the disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pscluster.errors import StorageError
from psmaster.model.job import StepRecord
from psmaster.model.reports import Evaluated, MetricLine

FILE_NAME = "metrics.jsonl"


def line_of(entry: MetricLine) -> str:
    """The line, without its end. A number that JSON has no word for (NaN, infinity) is null."""
    if isinstance(entry, Evaluated):
        data: dict[str, Any] = {"step": entry.step, "eval": {name: _number(value) for name, value in entry.metrics}}
    else:
        data = {own.name: getattr(entry, own.name) for own in fields(StepRecord)}
        data |= {name: _number(data[name]) for name in ("loss", "grad_norm", "lr", "weight", "samples")}
    return json.dumps(data, allow_nan=False)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def step_and_kind(line: str) -> tuple[int, bool]:
    """(step, whether it is an evaluation) of a line. Raises ValueError for what is none of ours."""
    data = json.loads(line)
    if not isinstance(data, dict) or not isinstance(data.get("step"), int):
        raise ValueError(f"not a line of {FILE_NAME}: {line[:80]!r}")
    return data["step"], "eval" in data


class MetricsFile:
    """One job's file. Used from one thread at a time; holds no descriptor between calls."""

    def __init__(self, directory: Path) -> None:
        """Find the last lines of `directory`'s file, cutting off one that a crash left half written."""
        self.path = directory / FILE_NAME
        self._last = {False: -1, True: -1}
        good = 0
        for line, end in _complete_lines(self.path):
            self._note(line)
            good = end
        if self.path.exists() and self.path.stat().st_size > good:
            with self.path.open("r+b") as file:
                file.truncate(good)

    def append(self, entries: Iterable[MetricLine]) -> None:
        """Write what is new. Raises StorageError; then nothing of it counts, and it may be repeated."""
        fresh = [entry for entry in entries if entry.step > self._last[isinstance(entry, Evaluated)]]
        if not fresh:
            return
        text = "".join(line_of(entry) + "\n" for entry in fresh).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_whole(self.path, text)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error
        for entry in fresh:
            kind = isinstance(entry, Evaluated)
            self._last[kind] = max(self._last[kind], entry.step)

    def cut(self, step: int) -> None:
        """Drop every line after `step`. Safe to repeat. Raises StorageError."""
        if max(self._last.values()) <= step:
            return
        kept = [line for line, _ in _complete_lines(self.path) if step_and_kind(line)[0] <= step]
        temporary = self.path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise StorageError(f"cannot rewrite {self.path}: {error.strerror}") from error
        self._last = {False: -1, True: -1}
        for line in kept:
            self._note(line)

    def _note(self, line: str) -> None:
        step, evaluation = step_and_kind(line)
        self._last[evaluation] = max(self._last[evaluation], step)


def append_whole(path: Path, data: bytes) -> None:
    """Append all of `data` or nothing of it, as far as a full disk goes."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            file.truncate(size)
            raise


def _complete_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Every line that has its end and is one of ours, with the offset after it; stops at the first that is not."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = 0
        for raw in file:
            end += len(raw)
            try:
                line = raw.decode().rstrip("\n")
                step_and_kind(line)
            except ValueError:
                return
            if not raw.endswith(b"\n"):
                return
            yield line, end
