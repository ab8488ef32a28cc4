"""Metrics, logs and bundles on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pscluster.errors import BundleError, NotFoundError
from psmaster.api import log_tail
from psmaster.api.log_tail import MetricsTail
from psmaster.model.reports import Evaluated
from psmaster.storage.bundles import BundleShelf
from psmaster.storage.logs import LogMessage, LogReader, ProcessLog, older, paths_of
from psmaster.storage.metrics_file import MetricsFile, line_of, step_and_kind
from tests.harness.master_world import make_record


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# metrics


def test_a_step_and_an_evaluation_become_lines() -> None:
    assert json.loads(line_of(make_record(2))) == {
        "step": 2,
        "loss": 0.5,
        "grad_norm": 0.5,
        "lr": 0.1,
        "weight": 64.0,
        "samples": 16.0,
        "skipped": False,
        "time_s": 1002.0,
    }
    evaluated = Evaluated(generation=1, step=2, metrics=(("acc", 0.5), ("loss", float("nan"))))
    assert json.loads(line_of(evaluated)) == {"step": 2, "eval": {"acc": 0.5, "loss": None}}


def test_lines_are_appended_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "job")
    file.append([make_record(1), make_record(2)])
    file.append([make_record(2), make_record(3)])
    file.append([make_record(3)])
    assert steps_in(file.path) == [1, 2, 3]
    again = MetricsFile(tmp_path / "job")
    again.append([make_record(3), Evaluated(generation=1, step=3, metrics=()), make_record(4)])
    again.append([Evaluated(generation=1, step=3, metrics=())])
    assert steps_in(file.path) == [1, 2, 3, 3, 4]


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.append([make_record(1), make_record(2)])
    whole = file.path.read_bytes()
    for length in range(len(whole)):
        file.path.write_bytes(whole[:length])
        again = MetricsFile(tmp_path)
        again.append([make_record(1), make_record(2)])
        assert again.path.read_bytes() == whole


def test_going_back_cuts(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.append([make_record(step) for step in range(1, 11)])
    file.append([Evaluated(generation=1, step=10, metrics=())])
    file.cut(6)
    file.cut(6)
    assert steps_in(file.path) == [1, 2, 3, 4, 5, 6]
    file.append([make_record(7)])
    assert steps_in(file.path)[-1] == 7
    file.cut(0)
    assert steps_in(file.path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_follower_reads_on_over_a_cut_without_repeating(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    tail = MetricsTail(file.path, from_step=2)
    assert tail.read() == []
    file.append([make_record(step) for step in range(1, 6)])
    assert [json.loads(line)["step"] for line in tail.read()] == [3, 4, 5]
    file.cut(3)
    file.append([make_record(4)])
    assert tail.read() == []
    file.append([make_record(5), make_record(6)])
    assert [json.loads(line)["step"] for line in tail.read()] == [6]


def test_a_reader_goes_on_where_another_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path)
    file.append([make_record(step) for step in range(1, 6)])
    first = MetricsTail(file.path, 0)
    assert len(first.read()) == 5
    file.append([make_record(6)])
    parsed: list[str] = []
    monkeypatch.setattr(log_tail, "step_and_kind", lambda line: parsed.append(line) or step_and_kind(line))
    second = MetricsTail(file.path, 0, first.position)
    assert [json.loads(line)["step"] for line in second.read()] == [6] and len(parsed) == 1
    file.cut(3)
    file.append([make_record(4)])
    assert [json.loads(line)["step"] for line in MetricsTail(file.path, 3, second.position).read()] == [4]
    assert len(MetricsTail(file.path, 0, "no position").read()) == 4


# logs


def message(sequence: int, *texts: str, attempt: int = 1, dropped: int = 0, source: str = "trainer-0") -> LogMessage:
    lines = tuple((float(sequence), "stdout", text) for text in texts)
    return LogMessage(source=source, attempt=attempt, sequence=sequence, lines=lines, dropped=dropped)


def test_lines_are_written_once_over_restarts_and_attempts(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "trainer-0.log"
    log = ProcessLog(path)
    assert log.append(message(5, "a", "b"))
    assert not log.append(message(5, "a", "b"))
    again = ProcessLog(path)
    assert not again.append(message(5, "a", "b"))
    assert again.append(message(1, "c", attempt=2))
    assert again.append(message(6, "late", dropped=3))
    reader = LogReader(tmp_path / "logs")
    assert [entry.text for entry in reader.read()] == [
        "c",
        "a",
        "b",
        "[3 lines were lost here: too many at once]",
        "late",
    ]
    assert reader.read() == []


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "trainer-0.log"
    ProcessLog(path).append(message(1, "whole"))
    with path.open("ab") as file:
        file.write(b'{"t": 1')
    log = ProcessLog(path)
    log.append(message(2, "next"))
    assert [entry.text for entry in LogReader(tmp_path).read()] == ["whole", "next"]


def test_a_log_is_bounded_and_a_reader_misses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trainer-0.log"
    log = ProcessLog(path, max_bytes=500)
    reader = LogReader(tmp_path)
    seen: list[str] = []
    for number in range(1, 41):
        log.append(message(number, f"line {number}"))
        if number % 5 == 0:
            seen += [entry.text for entry in reader.read()]
    assert seen == [f"line {number}" for number in range(1, 41)]
    assert path.stat().st_size <= 500
    assert older(path).stat().st_size <= 500
    assert LogReader(tmp_path).read()[-1].text == "line 40"


def test_logs_are_found_by_kind_and_rank(tmp_path: Path) -> None:
    for name in ("partition-0", "trainer-10", "trainer-2", "other"):
        (tmp_path / f"{name}.log").touch()
    assert [path.stem for path in paths_of(tmp_path)] == ["trainer-2", "trainer-10", "partition-0"]
    assert [path.stem for path in paths_of(tmp_path, "trainer", 2)] == ["trainer-2"]
    assert [path.stem for path in paths_of(tmp_path, rank=0)] == ["partition-0"]
    assert paths_of(tmp_path / "nowhere") == []


# bundles

DATA = b"some code" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


def test_a_bundle_is_stored_under_its_content(tmp_path: Path) -> None:
    shelf = BundleShelf(tmp_path)
    upload = shelf.begin(DIGEST, len(DATA))
    upload.add(DATA[:100])
    assert not shelf.has(DIGEST)
    upload.add(DATA[100:])
    assert upload.commit() == len(DATA)
    upload.abort()
    assert shelf.has(DIGEST)
    assert b"".join(shelf.chunks(DIGEST)) == DATA
    shelf.remove(DIGEST)
    shelf.remove(DIGEST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [DATA + b"more", DATA[:-1], b"x" * len(DATA)])
def test_other_content_than_announced_is_refused(tmp_path: Path, data: bytes) -> None:
    upload = BundleShelf(tmp_path).begin(DIGEST, len(DATA))

    def send() -> None:
        upload.add(data)
        upload.commit()

    with pytest.raises(BundleError):
        send()
    upload.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../" + DIGEST, DIGEST.upper(), DIGEST[:-1], "/etc/passwd"])
def test_what_is_no_digest_names_no_bundle(tmp_path: Path, name: str) -> None:
    shelf = BundleShelf(tmp_path)
    assert not shelf.has(name)
    with pytest.raises(BundleError):
        shelf.begin(name, 1)
    with pytest.raises(NotFoundError):
        next(shelf.chunks(name))


def test_too_long_is_refused_before_a_byte_is_taken(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        BundleShelf(tmp_path).begin(DIGEST, (64 << 20) + 1)
    assert list(tmp_path.iterdir()) == []


def test_broken_uploads_are_removed_at_start(tmp_path: Path) -> None:
    upload = BundleShelf(tmp_path).begin(DIGEST, len(DATA))
    upload.add(DATA)
    BundleShelf(tmp_path)
    assert list(tmp_path.iterdir()) == []
    upload.abort()
