"""logs and metrics."""

from __future__ import annotations

import csv
import io
import json

from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster, job_message, log_record

LINES = [
    '{"step": 1, "loss": 2.5, "lr": 0.001, "skipped": false, "time_s": 1.7e9}',
    '{"step": 2, "loss": 2.25, "lr": 0.001, "skipped": false, "time_s": 1.7e9}',
    '{"step": 2, "metrics": {"loss": 2.0, "bits_per_byte": 3.0}}',
]


def test_logs_are_prefixed_by_role_and_rank(run: Psctl, fake: FakeMaster) -> None:
    fake.log_streams = [[log_record("trainer-0", 1.7e9, "hello"), log_record("partition-1", 1.7e9, "there")]]
    assert run("logs", "lm").stdout == "trainer-0 | hello\npartition-1 | there\n"


def test_a_job_without_output_says_so_beside_the_answer(run: Psctl) -> None:
    result = run("logs", "lm")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no output\n")


def test_logs_can_be_narrowed(run: Psctl, fake: FakeMaster) -> None:
    assert run("logs", "lm", "--worker", "2", "--tail", "5", "--since", "1970-01-01T00:01:40+00:00").exit_code == 0
    assert run("logs", "lm", "--server", "1", "--timestamps").exit_code == 0
    first, second = fake.log_requests
    assert (first.kind, first.rank, first.tail, first.since_s) == ("trainer", 2, 5, 100.0)
    assert (second.kind, second.rank, second.tail) == ("partition", 1, 0)


def test_timestamps_come_first(run: Psctl, fake: FakeMaster) -> None:
    fake.log_streams = [[log_record("trainer-0", 1.7e9, "hello")]]
    line = run("logs", "lm", "--timestamps").stdout
    assert line.startswith("2023-11-1")
    assert line.endswith(" trainer-0 | hello\n")


def test_metrics_as_table_csv_and_json(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = job_message()
    fake.metric_lines = LINES
    table = [line.split() for line in run("metrics", "lm").stdout.splitlines()]
    assert table[0] == ["STEP", "LOSS", "LR", "SKIPPED", "METRICS.LOSS", "METRICS.BITS-PER-BYTE"]
    assert table[1] == ["1", "2.5000", "0.0010", "no", "-", "-"]
    assert table[3] == ["2", "-", "-", "-", "2.0000", "3.0000"]
    rows = list(csv.DictReader(io.StringIO(run("metrics", "lm", "-o", "csv").stdout)))
    assert [row["loss"] for row in rows] == ["2.5", "2.25", ""]
    assert rows[2]["metrics.bits_per_byte"] == "3.0"
    document = json.loads(run("metrics", "lm", "-o", "json").stdout)
    assert (document["kind"], document["job_id"], document["name"]) == ("MetricsList", "lm-abc123", "lm")
    assert document["items"] == [json.loads(line) for line in LINES]


def test_no_metrics_yet(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = job_message()
    result = run("metrics", "lm")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no step yet" in result.stderr
    assert "no step above 7" in run("metrics", "lm", "--from-step", "7").stderr
    assert run("metrics", "lm", "-o", "csv").stdout == "\n"
